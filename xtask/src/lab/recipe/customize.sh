#!/bin/sh
# Makes the lab of a freshly bootstrapped root: customize.sh ROOT RECIPE OUT
#
# Leaves in OUT: `root.img` (ext4), `vmlinuz`, `initrd`. Runs as root, or as what is root in mmdebstrap's namespace.
set -eu
root=$1 recipe=$2 out=$3
release=$(basename "$(echo "$root"/lib/modules/*)")

# --- an initramfs that knows one disk
work=$root/tmp/initrd
mkdir -p "$work/bin" "$work/proc" "$work/sys" "$work/dev" "$work/mnt" "$work/modules"
cp "$root/bin/busybox" "$work/bin/"
cp "$recipe/init" "$work/init"
chmod 755 "$work/init"
: >"$work/modules/order"
chroot "$root" modprobe --set-version "$release" --show-depends --all virtio_pci virtio_blk ext4 | while read -r kind module _; do
    [ "$kind" = insmod ] || continue
    name=$(basename "$module")
    [ -e "$work/modules/$name" ] && continue
    cp "$root$module" "$work/modules/"
    echo "$name" >>"$work/modules/order"
done
(cd "$work" && find . | chroot "$root" sh -c 'cd /tmp/initrd && cpio --quiet --create --format=newc') >"$out/initrd"
cp "$root/boot/vmlinuz-$release" "$out/vmlinuz"
rm -rf "$work" "$root/boot/"* "$root/vmlinuz"* "$root/initrd.img"*

# --- who lives here
echo lab >"$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 lab\n::1 localhost\n' >"$root/etc/hosts"
echo 'The machine in which system mode of banger is tested.' >"$root/etc/banger-lab"
: >"$root/etc/machine-id"
chroot "$root" useradd --create-home --uid 1000 --shell /bin/bash --groups kvm dev
# Somebody who has no business with banger.
chroot "$root" useradd --create-home --uid 1001 --shell /bin/bash stranger
echo 'dev ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/dev"
chmod 440 "$root/etc/sudoers.d/dev"
chroot "$root" passwd --quiet --delete root
echo '/dev/vda / ext4 defaults,noatime 0 0' >"$root/etc/fstab"

# --- what starts
install -D -m 755 "$recipe/runner" "$root/usr/lib/banger-lab/runner"
install -D -m 644 "$recipe/banger-lab.service" "$root/etc/systemd/system/banger-lab.service"
install -D -m 644 "$recipe/uplink.network" "$root/etc/systemd/network/10-uplink.network"
install -D -m 644 "$recipe/autologin.conf" "$root/etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf"
install -D -m 644 "$recipe/system.conf" "$root/etc/systemd/system.conf.d/lab.conf"
install -D -m 644 "$recipe/journald.conf" "$root/etc/systemd/journald.conf.d/lab.conf"
install -D -m 644 "$recipe/modprobe.conf" "$root/etc/modprobe.d/lab.conf"
# A processor that can virtualise has this loaded by its name on any other machine; here that takes udev seconds.
echo kvm_amd >"$root/etc/modules-load.d/lab.conf"
ln -sf ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
    fstrim.timer getty@tty1.service systemd-networkd-wait-online.service \
    systemd-logind.service systemd-update-utmp.service systemd-update-utmp-runlevel.service \
    systemd-random-seed.service modprobe@drm.service modprobe@efi_pstore.service modprobe@fuse.service \
    modprobe@dm_mod.service modprobe@loop.service mdcheck_start.timer nftables.service \
    systemd-binfmt.service sys-kernel-debug.mount sys-kernel-tracing.mount dev-hugepages.mount; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
mkdir -p "$root/etc/systemd/system-generators"
ln -sf /dev/null "$root/etc/systemd/system-generators/systemd-getty-generator"
ln -sf /dev/null "$root/etc/systemd/system-generators/systemd-gpt-auto-generator"
ln -sf multi-user.target "$root/etc/systemd/system/default.target"
chroot "$root" systemctl --quiet enable systemd-networkd.service systemd-resolved.service banger-lab.service

# --- the disk
rm -rf "$root/var/cache/apt/"* "$root/var/lib/apt/lists/"* "$root/var/log/"*.log
truncate --size=16G "$out/root.img"
# What mmdebstrap has mounted inside (/proc, /sys) does not show through a bind mount.
# shellcheck disable=SC2016 # expanded by the inner shell
unshare --mount sh -euc '
    mount --bind "$1" "$1/mnt"
    exec mkfs.ext4 -q -F -L lab -m 0 -O ^has_journal,^resize_inode -E root_owner=0:0,lazy_itable_init=1,nodiscard \
        -d "$1/mnt" "$2"
' sh "$root" "$out/root.img"
