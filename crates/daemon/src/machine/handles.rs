//! `handles.json`: what is true of a machine's engine now. The file is written before anything in memory says so; when it
//! can't be read it is made again by looking.

use std::io::Write;
use std::path::Path;

use banger_proto::error::ApiError;
use banger_vmm::Handles;

use crate::error;

/// Largest file that is read.
const MAX: u64 = 64 * 1024;

/// Reads the handles. `Err` says why a file that is there is of no use.
pub fn read(path: &Path) -> Result<Option<Handles>, String> {
    use std::io::Read;
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.to_string()),
    };
    let mut text = String::new();
    file.take(MAX).read_to_string(&mut text).map_err(|e| e.to_string())?;
    serde_json::from_str(&text).map(Some).map_err(|e| e.to_string())
}

/// Writes the handles: whole or not at all. They need not outlive the host's power, for then no process does.
pub fn write(path: &Path, handles: &Handles) -> Result<(), ApiError> {
    let text = serde_json::to_vec_pretty(handles).unwrap_or_default();
    write_whole(path, &text).map_err(|e| error::io(format_args!("write {}", path.display()), e))
}

/// Writes a file beside its place and moves it there: whole or not at all, also when the host loses power.
pub fn write_atomically(path: &Path, content: &[u8]) -> std::io::Result<()> {
    write_beside(path, content, true)
}

/// The same for what can be made again after the host lost power, or is of no use then.
pub fn write_whole(path: &Path, content: &[u8]) -> std::io::Result<()> {
    write_beside(path, content, false)
}

fn write_beside(path: &Path, content: &[u8], lasting: bool) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut temporary = path.to_owned().into_os_string();
    temporary.push(".new");
    let written = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| {
            file.write_all(content)?;
            if lasting { file.sync_data() } else { Ok(()) }
        })
        .and_then(|()| std::fs::rename(&temporary, path));
    // Half a file on a full disk is in the way of everything else.
    written.inspect_err(|_| drop(std::fs::remove_file(&temporary)))
}

/// Removes the handles once the engine is gone.
pub fn remove(path: &Path) -> Result<(), ApiError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(error::io(format_args!("remove {}", path.display()), e))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_read_back_and_nonsense_is_told_from_nothing() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("handles.json");
        assert_eq!(read(&path), Ok(None));
        let handles = Handles {
            engine: "qemu".to_owned(),
            pid: 12,
            start_time: 34,
            host_boot_id: "b".to_owned(),
            control: "/r/control.sock".into(),
            agent: "/r/agent.sock".into(),
        };
        write(&path, &handles).unwrap();
        assert_eq!(read(&path), Ok(Some(handles)));
        for bad in ["", "{", "\u{0}\u{0}", "[1,2]"] {
            std::fs::write(&path, bad).unwrap();
            assert!(read(&path).is_err(), "{bad:?}");
        }
        remove(&path).unwrap();
        remove(&path).unwrap();
    }
}
