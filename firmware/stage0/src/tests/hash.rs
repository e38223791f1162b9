//! Hashing, and sharing out work.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::sha256::{Engine, digest};
use crate::work::Queue;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The engines that this machine can run.
fn engines() -> Vec<Engine> {
    let mut engines = vec![Engine::Software];
    if std::arch::is_x86_feature_detected!("bmi2") {
        engines.push(Engine::Bmi2);
    }
    if std::arch::is_x86_feature_detected!("sha") && std::arch::is_x86_feature_detected!("sse4.1") {
        engines.push(Engine::Extensions);
    }
    engines
}

#[test]
fn digests_are_those_of_the_standard() {
    // FIPS 180-2, appendix B, and the digest of nothing.
    let million = vec![b'a'; 1_000_000];
    let cases: [(&[u8], &str); 4] = [
        (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (
            b"abc",
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        ),
        (
            b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
        ),
        (
            &million,
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
        ),
    ];
    for engine in engines() {
        for (data, wanted) in cases {
            assert_eq!(hex(&digest(engine, data)), wanted, "{engine:?}, {} bytes", data.len());
        }
    }
}

#[test]
fn engines_agree_at_every_length() {
    let data: Vec<u8> = (0..300u32)
        .map(|index| index.wrapping_mul(167).to_le_bytes()[0])
        .collect();
    for len in 0..data.len() {
        let wanted = digest(Engine::Software, &data[..len]);
        for engine in engines() {
            assert_eq!(digest(engine, &data[..len]), wanted, "{engine:?}, {len} bytes");
        }
    }
}

#[test]
fn each_item_is_taken_once_and_the_lowest_failure_is_told() {
    const ITEMS: usize = 1000;
    let queue = Queue::new();
    queue.help(|_| panic!("a queue that is not open has no items"));
    let taken: Vec<_> = (0..ITEMS).map(|_| AtomicUsize::new(0)).collect();
    queue.open(ITEMS);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                queue.help(|item| {
                    taken[item].fetch_add(1, Ordering::Relaxed);
                    item % 300 != 299
                });
            });
        }
        assert_eq!(queue.wait(), Some(299));
    });
    assert!(taken.iter().all(|count| count.load(Ordering::Relaxed) == 1));
    queue.help(|_| panic!("nothing is left"));
    let queue = Queue::new();
    queue.open(0);
    assert_eq!(queue.wait(), None);
}
