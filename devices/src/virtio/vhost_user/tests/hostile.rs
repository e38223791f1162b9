//! Back ends that are slow, stubborn, old or broken.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;
use vhost::vhost_user::message::{FrontendReq, VhostUserVirtioFeatures};

use super::*;
use crate::virtio::vhost_user::frontend::Frontend;

const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
const SOON: Duration = Duration::from_millis(20);

fn open(socket: UnixStream, limit: Duration) -> Result<Frontend, VhostUserError> {
    Frontend::on(socket, Path::new("/run/back-end"), limit)
}

/// An answer as it is on the wire.
fn answer(request: FrontendReq, body: &[u8]) -> Vec<u8> {
    let mut bytes = u32::from(request).to_ne_bytes().to_vec();
    bytes.extend(5u32.to_ne_bytes());
    bytes.extend(u32::try_from(body.len()).unwrap().to_ne_bytes());
    bytes.extend(body);
    bytes
}

/// What a back end says until it is connected: features, those of the protocol, and that it heard SET_OWNER.
fn greeting() -> Vec<Vec<u8>> {
    vec![
        answer(FrontendReq::GET_FEATURES, &(PROTOCOL_FEATURES | 1 << 32).to_ne_bytes()),
        answer(FrontendReq::GET_PROTOCOL_FEATURES, &u64::MAX.to_ne_bytes()),
        answer(FrontendReq::SET_OWNER, &0u64.to_ne_bytes()),
    ]
}

/// A front end whose back end has said `more` after its greeting, and the back end's socket.
fn greeted(more: &[u8]) -> (Frontend, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&greeting().concat()).unwrap();
    theirs.write_all(more).unwrap();
    (open(ours, SOON).unwrap(), theirs)
}

#[test]
fn one_that_says_nothing_is_given_up() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let error = open(ours, SOON).err().unwrap();
    assert!(matches!(&error, VhostUserError::Io { source, .. } if source.kind() == io::ErrorKind::TimedOut));
    assert!(error.to_string().contains("/run/back-end: GET_FEATURES"), "{error}");

    // Half an answer is none.
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&greeting()[0][..15]).unwrap();
    let error = open(ours, SOON).err().unwrap();
    assert!(matches!(&error, VhostUserError::Io { source, .. } if source.kind() == io::ErrorKind::TimedOut));

    // A queue that is not given back.
    let (mut frontend, _theirs) = greeted(&answer(FrontendReq::SET_VRING_ENABLE, &[0; 8]));
    let error = frontend.stop_ring(0).unwrap_err().to_string();
    assert!(error.contains("GET_VRING_BASE") && frontend.is_gone(), "{error}");
    let error = frontend.set_features(0).unwrap_err().to_string();
    assert!(error.contains("gone"), "{error}");
}

#[test]
fn one_that_does_not_read_is_given_up() {
    let (mut frontend, _theirs) = greeted(&[]);
    // Far more than sockets hold; each answer is missed too.
    let mut refused = 0;
    for _ in 0..3 {
        refused += usize::from(frontend.set_config(0, &[0; 4000]).is_err());
    }
    assert_eq!(refused, 3);
    assert!(frontend.is_gone());
}

#[test]
fn one_that_refuses_is_named_with_what_it_refuses() {
    let refusal = answer(FrontendReq::SET_FEATURES, &22u64.to_ne_bytes());
    let (mut frontend, _theirs) = greeted(&refusal);
    let error = frontend.set_features(1 << 32).unwrap_err().to_string();
    assert!(error.contains("refuses SET_FEATURES (code 0x16)"), "{error}");
    // It said so in good order: there is no reason to leave.
    assert!(!frontend.is_gone());
    frontend.check().unwrap();
}

#[test]
fn one_that_speaks_unasked_is_given_up() {
    let (mut frontend, mut theirs) = greeted(&[]);
    frontend.check().unwrap();
    theirs.write_all(&[7]).unwrap();
    let error = frontend.check().unwrap_err().to_string();
    assert!(error.contains("speaks unasked"), "{error}");
    assert!(frontend.is_gone() && frontend.check().is_err());
    // The other end hears of it, behind what was sent before.
    theirs.read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn one_that_answers_something_else_is_given_up() {
    let mut other = greeting();
    other.swap(0, 1);
    let mut long = greeting();
    long[0][8] = 12;
    let mut request = greeting();
    request[0][4] = 1;
    let mut version = greeting();
    version[0][4] = 6;
    for (bytes, what) in [
        (other, "answers something else"),
        (long, "another length"),
        (request, "answers something else"),
        (version, "answers something else"),
    ] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&bytes.concat()).unwrap();
        let error = open(ours, SOON).err().unwrap().to_string();
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn one_without_virtio_1_is_refused() {
    let back_end = BackEnd::start(0, 2);
    back_end.see(|s| s.features &= !(1 << 32));
    let error = VhostUser::fs(&fs_options(&back_end)).err().unwrap().to_string();
    assert!(error.contains("virtio 1.0"), "{error}");
}

#[test]
fn one_without_the_protocols_features_works() {
    let back_end = BackEnd::start(0, 2);
    back_end.see(|s| s.features &= !PROTOCOL_FEATURES);
    let mut h = fs(&back_end);
    h.activate().unwrap();
    assert_eq!(echo(&mut h, 1, b"old"), b"dlo");
    h.reset();
    h.activate().unwrap();
    assert_eq!(echo(&mut h, 1, b"old"), b"dlo");
    assert_eq!(back_end.see(|s| (s.acked, s.acked_protocol)), (1 << 32 | 1 << 28, 0));
    let options = VhostUserFsOptions {
        num_queues: 2,
        ..fs_options(&back_end)
    };
    drop(h);
    let second = BackEnd::start(0, 3);
    second.see(|s| s.features &= !PROTOCOL_FEATURES);
    let options = VhostUserFsOptions {
        socket: second.path.clone(),
        ..options
    };
    // It does not say that it has three.
    assert!(VhostUser::fs(&options).is_err());
}

proptest! {
    /// Whatever a back end says, each call returns, and an error that leaves the connection out of step ends it.
    #[test]
    fn nonsense_is_an_error(polite in 0usize..=3, noise in prop::collection::vec(any::<u8>(), 0..200), words in prop::collection::vec((0u32..45, 0u32..16, 0u32..100), 0..6)) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&greeting()[..polite].concat()).unwrap();
        for (request, flags, size) in words {
            for word in [request, flags, size] {
                theirs.write_all(&word.to_ne_bytes()).unwrap();
            }
            theirs.write_all(&vec![0; size as usize]).unwrap();
        }
        theirs.write_all(&noise).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        let Ok(mut frontend) = open(ours, Duration::from_secs(30)) else { return Ok(()) };
        let mut config = [0; 60];
        let outcomes = [
            frontend.queue_count().map(|_| ()),
            frontend.config(&mut config),
            frontend.set_features(1 << 32),
            frontend.stop_ring(0),
            frontend.check(),
        ];
        // At least the last one finds the end of what was said.
        prop_assert!(outcomes.iter().any(Result::is_err));
        prop_assert!(frontend.is_gone());
    }
}
