//! The API socket in the control loop: requests go to the handlers one after the other, their replies back to whom they
//! came from. vmm.ping does not wait its turn: while a step that may take long is under way, a helper thread answers it.

use std::collections::VecDeque;
use std::error::Error;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::thread;

use podvisor_api::http::{Incoming, Response, Server};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::handlers::{Call, State, answer, is_ping, may_take_long, pong};
use crate::pod::{Events, PodSlot};
use crate::sys;

/// The socket and its connections.
pub struct ApiSocket {
    server: Server,
    /// Requests that came and wait for those before them.
    queue: VecDeque<Incoming>,
}

/// The helper waits and answers pings; that takes little.
const HELPER_STACK: usize = 128 << 10;

impl ApiSocket {
    /// Serves what `--api-socket` names: `PATH`, `path=PATH`, or `fd=N` for a listening socket that was inherited.
    ///
    /// # Errors
    /// When another process serves the path, or it cannot be bound, or N is no listening UNIX socket.
    pub fn open(text: &str) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let server = if let Some(number) = text.strip_prefix("fd=") {
            let fd = number
                .parse()
                .map_err(|_| format!("--api-socket fd={number}: not a descriptor's number"))?;
            let fd = sys::inherited_listener(fd).map_err(|e| format!("--api-socket fd={number}: {e}"))?;
            Server::from_fd(fd)?
        } else {
            Server::bind(Path::new(text.strip_prefix("path=").unwrap_or(text)))?
        };
        Ok(Self {
            server,
            queue: VecDeque::new(),
        })
    }

    /// Its path, if it was bound here.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.server.path()
    }

    /// Answers the requests that have arrived.
    pub fn serve(&mut self, pod: &mut PodSlot, events: &mut Events, shutdown: &mut bool) {
        let incoming = self.server.poll();
        take(&mut self.server, &mut self.queue, incoming);
        while let Some(mut incoming) = self.queue.pop_front() {
            let files = std::mem::take(&mut incoming.request.files);
            let call = call(&incoming);
            let long = may_take_long(pod, &call);
            let mut state = State {
                pod,
                events,
                shutdown,
                files,
            };
            let reply = if long {
                self.meanwhile(|| answer(&mut state, &call))
            } else {
                answer(&mut state, &call)
            };
            let response = Response::new(reply.status, reply.body.unwrap_or_default());
            self.server.respond(incoming.connection, &response);
        }
    }

    /// Does `work` on this thread while a helper answers vmm.ping; what else comes waits until `work` is done. Without a
    /// thread or descriptor for the helper, pings wait too.
    pub fn meanwhile<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let Ok((done, epoll)) = helper_wait(&self.server) else {
            return work();
        };
        let Self { server, queue } = self;
        thread::scope(|scope| {
            let (done, epoll) = (&done, &epoll);
            let helper = thread::Builder::new().name("api".to_owned()).stack_size(HELPER_STACK);
            let helper = helper.spawn_scoped(scope, move || answer_pings(server, queue, epoll));
            let outcome = work();
            // Fails only when the counter is full, and then the helper has been told.
            let _ = done.write(1);
            match helper {
                // Waited for by name, so that the thread is gone and not only its work done.
                Ok(helper) => drop(helper.join()),
                Err(error) => tracing::debug!(%error, "there was no thread to answer vmm.ping meanwhile"),
            }
            outcome
        })
    }

    /// Writes out what clients have not yet taken, before the process ends.
    pub fn flush(&mut self) {
        self.server.drain();
    }
}

fn call(incoming: &Incoming) -> Call<'_> {
    Call {
        method: &incoming.request.method,
        path: &incoming.request.path,
        body: &incoming.request.body,
    }
}

/// Answers the pings of `incoming`, and has the rest wait in `queue`.
fn take(server: &mut Server, queue: &mut VecDeque<Incoming>, incoming: Vec<Incoming>) {
    for incoming in incoming {
        if is_ping(&call(&incoming)) {
            let reply = pong();
            server.respond(
                incoming.connection,
                &Response::new(reply.status, reply.body.unwrap_or_default()),
            );
        } else {
            queue.push_back(incoming);
        }
    }
}

const DONE: u64 = 1;

/// What the helper waits with: the descriptor that ends it, and both that and the socket behind one.
fn helper_wait(server: &Server) -> io::Result<(EventFd, Epoll)> {
    let done = EventFd::new(EFD_NONBLOCK)?;
    let epoll = Epoll::new()?;
    epoll.ctl(
        ControlOperation::Add,
        done.as_raw_fd(),
        EpollEvent::new(EventSet::IN, DONE),
    )?;
    epoll.ctl(
        ControlOperation::Add,
        server.as_raw_fd(),
        EpollEvent::new(EventSet::IN, 0),
    )?;
    Ok((done, epoll))
}

fn answer_pings(server: &mut Server, queue: &mut VecDeque<Incoming>, epoll: &Epoll) {
    let mut ready = [EpollEvent::default(); 2];
    loop {
        let count = match epoll.wait(-1, &mut ready) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if ready.iter().take(count).any(|event| event.data() == DONE) {
            return;
        }
        let incoming = server.poll();
        take(server, queue, incoming);
    }
}

impl AsRawFd for ApiSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.server.as_raw_fd()
    }
}
