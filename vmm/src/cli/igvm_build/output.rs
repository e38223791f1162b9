//! A file that is there as a whole or not at all: written beside its name, flushed, and renamed.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::Failure;

/// A file under construction; removed when it is dropped before [`NewFile::put`].
pub(super) struct NewFile {
    file: File,
    name: PathBuf,
    temporary: PathBuf,
    put: bool,
    len: u64,
}

fn at<'p>(path: &'p Path) -> impl Fn(io::Error) -> Failure + 'p {
    move |e| Failure::runtime(format!("{}: {e}", path.display()))
}

impl NewFile {
    /// Starts the file that will be `name`.
    pub(super) fn create(name: &Path) -> Result<Self, Failure> {
        // What a rename would put away for good: a device, a pipe.
        if fs::metadata(name).is_ok_and(|metadata| !metadata.is_file()) {
            return Err(at(name)(io::Error::other(
                "exists and is no regular file; give another name",
            )));
        }
        let file_name = name
            .file_name()
            .ok_or_else(|| at(name)(io::Error::other("names no file")))?;
        let mut hidden = OsString::from(".");
        hidden.push(file_name);
        hidden.push(format!(".{}", std::process::id()));
        let temporary = name.with_file_name(hidden);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&temporary)
            .map_err(at(&temporary))?;
        Ok(Self {
            file,
            name: name.to_path_buf(),
            temporary,
            put: false,
            len: 0,
        })
    }

    /// Writes its contents.
    pub(super) fn write(&mut self, contents: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Failure> {
        contents(&mut self.file).map_err(at(&self.name))?;
        self.len = self.file.metadata().map_err(at(&self.name))?.len();
        Ok(())
    }

    /// Length of what was written.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// What was written.
    pub(super) fn map(&self) -> Result<Mmap, Failure> {
        crate::sys::map_file(&self.file).map_err(at(&self.name))
    }

    /// Makes it be there, on the disk too.
    pub(super) fn put(mut self) -> Result<(), Failure> {
        self.file.sync_all().map_err(at(&self.name))?;
        fs::rename(&self.temporary, &self.name).map_err(at(&self.name))?;
        self.put = true;
        let directory = match self.name.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(at(directory))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.put {
            // There is nobody to tell.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_there_as_a_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().join("image");
        fs::write(&name, "old").unwrap();
        let mut file = NewFile::create(&name).unwrap();
        let full = file.write(|to| {
            to.write_all(b"half")?;
            Err(io::Error::from_raw_os_error(libc::ENOSPC))
        });
        assert!(matches!(full, Err(Failure::Runtime(e)) if e.to_string().contains("No space")));
        drop(file);
        assert_eq!(
            (names(dir.path()), fs::read(&name).unwrap()),
            (vec!["image".to_owned()], b"old".to_vec())
        );
        let mut file = NewFile::create(&name).unwrap();
        file.write(|to| to.write_all(b"new")).unwrap();
        assert_eq!((&file.map().unwrap()[..], file.len()), (&b"new"[..], 3));
        assert_eq!(fs::read(&name).unwrap(), b"old");
        file.put().unwrap();
        assert_eq!(
            (names(dir.path()), fs::read(&name).unwrap()),
            (vec!["image".to_owned()], b"new".to_vec())
        );
    }

    #[test]
    fn what_is_no_file_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        assert!(NewFile::create(dir.path()).is_err());
        assert!(NewFile::create(Path::new("/dev/null")).is_err());
        assert!(NewFile::create(&dir.path().join("missing/image")).is_err());
        assert_eq!(names(dir.path()), Vec::<String>::new());
    }
}
