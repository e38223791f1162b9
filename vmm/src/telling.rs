//! The event monitor: tells whoever listens (`--event-monitor`) what happens to the pod. The control loop and vCPU
//! threads tell; nobody ever waits for the listener.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use podvisor_api::events::{Event, Source, What};

use crate::sys;

/// Where events go, if anywhere. Clones tell the same listener.
#[derive(Clone, Default)]
pub struct Telling(Option<Arc<Mutex<Listener>>>);

struct Listener {
    start: Instant,
    output: File,
    /// What is left of a record that the listener took a part of.
    rest: Vec<u8>,
    lost: u64,
}

impl Telling {
    /// Tells what `--event-monitor` names: `path=FILE` (a file, which is emptied, or a FIFO) or `fd=N` (a descriptor
    /// that was inherited). Times count from `start`.
    ///
    /// # Errors
    /// When it is neither, or cannot be opened or made non-blocking.
    pub fn open(text: &str, start: Instant) -> io::Result<Self> {
        let wrong = |reason: String| io::Error::new(io::ErrorKind::InvalidInput, reason);
        let output = if let Some(path) = text.strip_prefix("path=") {
            // For reading too: a FIFO that nobody reads yet can be opened then.
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open(path)
                .map_err(|e| io::Error::new(e.kind(), format!("{path}: {e}")))?
        } else if let Some(number) = text.strip_prefix("fd=") {
            let fd = number
                .parse()
                .map_err(|_| wrong(format!("fd={number}: not a descriptor's number")))?;
            File::from(sys::inherited_output(fd).map_err(|e| io::Error::new(e.kind(), format!("fd={fd}: {e}")))?)
        } else {
            return Err(wrong(format!("{text:?}: give path=FILE or fd=N")));
        };
        Ok(Self(Some(Arc::new(Mutex::new(Listener {
            start,
            output,
            rest: Vec::new(),
            lost: 0,
        })))))
    }

    /// Tells of the monitor.
    pub fn vmm(&self, event: What) {
        self.tell(Source::Vmm, event, &[]);
    }

    /// Tells of the pod.
    pub fn vm(&self, event: What) {
        self.tell(Source::Vm, event, &[]);
    }

    /// Tells `event`. What a listener has no room for is lost, whole records at a time.
    pub fn tell(&self, source: Source, event: What, properties: &[(&str, &str)]) {
        let Some(listener) = &self.0 else {
            return;
        };
        let mut listener = listener.lock().unwrap_or_else(PoisonError::into_inner);
        let properties = (!properties.is_empty()).then(|| {
            properties
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect()
        });
        let event = Event {
            timestamp: listener.start.elapsed(),
            source,
            event,
            properties,
        };
        listener.write(&event);
    }
}

impl Listener {
    fn write(&mut self, event: &Event) {
        let rest = std::mem::take(&mut self.rest);
        self.rest = self.write_some(rest);
        if self.rest.is_empty() {
            let record = event.to_record().into_bytes();
            let len = record.len();
            let left = self.write_some(record);
            if left.len() < len {
                self.rest = left;
                return;
            }
        }
        self.lost = self.lost.saturating_add(1);
        tracing::debug!(lost = self.lost, "the event monitor's listener does not keep up");
    }

    /// Writes what there is room for; returns the rest.
    fn write_some(&mut self, mut bytes: Vec<u8>) -> Vec<u8> {
        while !bytes.is_empty() {
            match self.output.write(&bytes) {
                Ok(0) => break,
                Ok(n) => drop(bytes.drain(..n.min(bytes.len()))),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn records(text: &str) -> Vec<Event> {
        text.split_terminator("\n\n")
            .map(|record| serde_json::from_str(record).unwrap())
            .collect()
    }

    #[test]
    fn a_file_holds_the_events_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events");
        std::fs::write(&path, "what another monitor left there").unwrap();
        let telling = Telling::open(&format!("path={}", path.display()), Instant::now()).unwrap();
        telling.vmm(What::Starting);
        telling.tell(Source::CpuManager, What::CreateVcpu, &[("id", "0")]);
        let got = records(&std::fs::read_to_string(path).unwrap());
        assert_eq!(got.len(), 2);
        assert_eq!((got[0].source, got[0].event), (Source::Vmm, What::Starting));
        assert_eq!(got[1].properties.as_ref().unwrap()["id"], "0");
        assert!(got[0].timestamp <= got[1].timestamp);
    }

    #[test]
    fn a_listener_that_reads_nothing_holds_nobody_up_and_gets_whole_records_later() {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        let telling = Telling::open(&format!("fd={}", writer.as_raw_fd()), Instant::now()).unwrap();
        drop(writer);
        for _ in 0..20_000 {
            telling.vm(What::Paused);
        }
        reader.set_nonblocking(true).unwrap();
        let mut got = vec![0; 64 << 20];
        let mut len = 0;
        while let Ok(n) = reader.read(&mut got[len..]) {
            len += n;
        }
        telling.vm(What::Resumed);
        while let Ok(n) = reader.read(&mut got[len..]) {
            len += n;
        }
        let got = records(std::str::from_utf8(&got[..len]).unwrap());
        assert!(got.len() < 20_000, "something was lost: there is not room for all");
        assert_eq!(got.last().unwrap().event, What::Resumed);
    }

    #[test]
    fn what_cannot_be_told_to_is_refused_by_name() {
        for (text, word) in [
            ("events", "path=FILE or fd=N"),
            ("fd=x", "fd=x"),
            ("fd=-1", "fd=-1"),
            ("path=/nowhere/at/all", "/nowhere/at/all"),
        ] {
            let error = Telling::open(text, Instant::now()).err().unwrap().to_string();
            assert!(error.contains(word), "{error}");
        }
        Telling::default().vm(What::Booted);
    }
}
