//! Which acceleration a host gets.
//!
//! That `/dev/kvm` opens says nothing by itself: on a PVM host (`CONFIG_KVM_PVM`, a guest without nested virtualisation) it
//! opens and answers the right API version, yet ordinary guest kernels hang or die under it. The flags of the processor
//! decide, the device only has a veto.

/// How the guest's processor is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// Hardware virtualisation.
    Kvm,
    /// Emulation.
    Tcg,
}

impl Accel {
    /// The word that QEMU and the API use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// Virtualisation extension that the processor shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Virtualisation {
    /// Intel.
    Vmx,
    /// AMD.
    Svm,
}

impl Virtualisation {
    /// Its flag in `/proc/cpuinfo`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Vmx => "vmx",
            Self::Svm => "svm",
        }
    }

    /// Reads it from the text of `/proc/cpuinfo`.
    pub fn from_cpuinfo(cpuinfo: &str) -> Option<Self> {
        let flags = cpuinfo.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim_end() == "flags").then_some(value)
        })?;
        flags.split_ascii_whitespace().find_map(|flag| match flag {
            "vmx" => Some(Self::Vmx),
            "svm" => Some(Self::Svm),
            _ => None,
        })
    }
}

/// What `/dev/kvm` said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvmDevice {
    /// There is none.
    Missing,
    /// It is there and could not be used. Says why.
    Unusable(String),
    /// It answered with this API version.
    Answers(i32),
}

/// The API version that every kernel since 2007 has.
pub const KVM_API_VERSION: i32 = 12;

/// What was picked and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccelChoice {
    /// How guests run here.
    pub accel: Accel,
    /// One sentence for `doctor`.
    pub reason: String,
    /// What would make it faster, where something would.
    pub hint: Option<String>,
}

/// Picks the acceleration.
pub fn choose_accel(flag: Option<Virtualisation>, kvm: &KvmDevice) -> AccelChoice {
    let tcg = |reason: String, hint: Option<&str>| AccelChoice {
        accel: Accel::Tcg,
        reason,
        hint: hint.map(str::to_owned),
    };
    match (flag, kvm) {
        (Some(flag), KvmDevice::Answers(KVM_API_VERSION)) => AccelChoice {
            accel: Accel::Kvm,
            reason: format!("the processor has {} and /dev/kvm answers", flag.as_str()),
            hint: None,
        },
        (_, KvmDevice::Answers(version)) if *version != KVM_API_VERSION => {
            tcg(format!("/dev/kvm answers API version {version}, not {KVM_API_VERSION}"), None)
        }
        (None, KvmDevice::Answers(_)) => tcg(
            "/dev/kvm answers, but the processor shows neither vmx nor svm (a PVM host): ordinary guest kernels do not boot under it"
                .to_owned(),
            Some("enable nested virtualisation for this machine"),
        ),
        (Some(flag), KvmDevice::Missing) => tcg(
            format!("the processor has {}, but there is no /dev/kvm", flag.as_str()),
            Some(match flag {
                Virtualisation::Vmx => "load the module: sudo modprobe kvm_intel",
                Virtualisation::Svm => "load the module: sudo modprobe kvm_amd",
            }),
        ),
        (None, KvmDevice::Missing) => tcg("there is no /dev/kvm and the processor shows neither vmx nor svm".to_owned(), None),
        (Some(flag), KvmDevice::Unusable(why)) => tcg(
            format!("the processor has {}, but /dev/kvm cannot be used: {why}", flag.as_str()),
            Some("join the device's group: sudo usermod -aG kvm \"$USER\", then log in again"),
        ),
        (None, KvmDevice::Unusable(why)) => {
            tcg(format!("the processor shows neither vmx nor svm, and /dev/kvm cannot be used: {why}"), None)
        }
        // The guard above took every other version.
        (Some(_), KvmDevice::Answers(version)) => tcg(format!("/dev/kvm answers API version {version}"), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_decide_and_the_device_has_a_veto() {
        use KvmDevice::{Answers, Missing, Unusable};
        use Virtualisation::{Svm, Vmx};
        let denied = || Unusable("permission denied".to_owned());
        let cases = [
            (Some(Vmx), Answers(12), Accel::Kvm, "has vmx"),
            (Some(Svm), Answers(12), Accel::Kvm, "has svm"),
            (None, Answers(12), Accel::Tcg, "PVM host"),
            (Some(Vmx), Answers(11), Accel::Tcg, "version 11"),
            (None, Answers(13), Accel::Tcg, "version 13"),
            (Some(Vmx), Missing, Accel::Tcg, "no /dev/kvm"),
            (Some(Svm), Missing, Accel::Tcg, "has svm"),
            (None, Missing, Accel::Tcg, "neither"),
            (Some(Vmx), denied(), Accel::Tcg, "permission denied"),
            (None, denied(), Accel::Tcg, "neither"),
        ];
        for (flag, kvm, accel, word) in cases {
            let choice = choose_accel(flag, &kvm);
            assert_eq!(choice.accel, accel, "{flag:?} {kvm:?}");
            assert!(choice.reason.contains(word), "{flag:?} {kvm:?}: {}", choice.reason);
        }
    }

    #[test]
    fn a_hint_names_the_module_or_the_group() {
        let hint = |flag, kvm| choose_accel(flag, &kvm).hint;
        assert!(hint(Some(Virtualisation::Svm), KvmDevice::Missing).is_some_and(|h| h.contains("kvm_amd")));
        assert!(
            hint(Some(Virtualisation::Vmx), KvmDevice::Unusable("no".into())).is_some_and(|h| h.contains("usermod"))
        );
        assert_eq!(hint(Some(Virtualisation::Vmx), KvmDevice::Answers(12)), None);
    }

    #[test]
    fn flags_are_whole_words_of_the_flags_line() {
        let info = |flags: &str| {
            format!("processor\t: 0\nmodel name\t: svm vmx\nflags\t\t: fpu {flags} tsc\nvmx flags\t: vnmi\n")
        };
        assert_eq!(Virtualisation::from_cpuinfo(&info("vmx")), Some(Virtualisation::Vmx));
        assert_eq!(Virtualisation::from_cpuinfo(&info("svm")), Some(Virtualisation::Svm));
        assert_eq!(Virtualisation::from_cpuinfo(&info("svm_lock vmx_x")), None);
        assert_eq!(Virtualisation::from_cpuinfo("svm vmx"), None);
        assert_eq!(Virtualisation::from_cpuinfo(""), None);
    }
}
