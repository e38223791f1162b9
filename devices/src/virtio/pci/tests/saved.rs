//! The transport saved and restored: the driver finds in the new one what it left in the old one, and a state that was
//! made up is refused or harmless.

use serde_json::{Value, json};

use super::*;
use crate::virtio::state::{StateError, TransportState};

const QUEUES: [u16; 2] = [16, 8];

/// A driver over another device with the same memory, as a restored monitor has it.
fn restored(from: &Driver, state: &TransportState) -> (Driver, Result<(), StateError>) {
    let mut d = driver(false, &QUEUES);
    let mut bytes = vec![0; usize::try_from(MEMORY).unwrap()];
    from.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    d.memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    d.root.write_config(1, 0, 4, &[0, 0]);
    let (offset, settings) = state.settings();
    d.root.write_config(1, 0, offset, settings);
    let outcome = lock(&d.subscriber.0).restore(state);
    d.bar = lock(&d.subscriber.0).config.bar_address(0);
    (d, outcome)
}

fn save(d: &Driver) -> TransportState {
    let state = lock(&d.subscriber.0).save().unwrap();
    let text = serde_json::to_string(&state).unwrap();
    let read: TransportState = serde_json::from_str(&text).unwrap();
    assert_eq!(read, state);
    read
}

fn offer(d: &Driver, index: u16) {
    d.memory.write_obj(0u16, GuestAddress(0x2004)).unwrap();
    d.memory.write_obj(index, GuestAddress(0x2002)).unwrap();
}

fn used(d: &Driver) -> u16 {
    d.memory.read_obj(GuestAddress(0x3002)).unwrap()
}

fn turn(d: &Driver) {
    let mut events = EventManager::<VirtioPciSubscriber>::new().unwrap();
    events.add_subscriber(d.subscriber.clone());
    while events.run_with_timeout(0).unwrap() > 0 {}
}

#[test]
fn a_driver_finds_what_it_left() {
    let first = driver(false, &QUEUES);
    let elsewhere = first.bar + 4 * BAR_SIZE;
    first.root.write_config(1, 0, 0x10, &elsewhere.to_le_bytes());
    let first = Driver {
        bar: elsewhere,
        ..first
    };
    first.msix();
    first.w(0x10, 2, 0);
    first.w(0x4003, 1, 7);
    first.up();
    first.memory.write_obj(0x4000u64, GuestAddress(0x1000)).unwrap();
    offer(&first, 3);
    first.w(0x6000, 2, 0);
    turn(&first);
    assert_eq!(used(&first), 3);
    // One that came and was not looked at.
    offer(&first, 4);
    let state = save(&first);
    let (second, outcome) = restored(&first, &state);
    outcome.unwrap();
    assert_eq!(second.bar, elsewhere);
    assert_eq!(second.status(), OK_STATUS | 4);
    assert_eq!(second.features(), first.features());
    assert_eq!(
        second.log.features.load(Ordering::SeqCst),
        first.log.features.load(Ordering::SeqCst)
    );
    for (offset, len) in [
        (0x10, 2),
        (0x16, 2),
        (0x18, 2),
        (0x1A, 2),
        (0x1C, 2),
        (0x20, 8),
        (0x28, 8),
        (0x30, 8),
        (0x4000, 8),
    ] {
        assert_eq!(second.r(offset, len), first.r(offset, len), "{offset:#x}");
    }
    assert_eq!(second.hypervisor.doorbells(), first.hypervisor.doorbells());
    let vectors = second.hypervisor.vectors(0).unwrap();
    assert_eq!(vectors.route(1).unwrap().data, 0x41);
    assert_eq!(vectors.triggered(1), 1, "an interrupt that may have been on its way");
    turn(&second);
    assert_eq!(used(&second), 4, "a doorbell that may have been on its way");
    offer(&second, 5);
    second.w(0x6000, 2, 0);
    turn(&second);
    assert_eq!((used(&second), second.status()), (5, OK_STATUS | 4));
    // The one that was saved goes on, too.
    turn(&first);
    offer(&first, 5);
    first.w(0x6000, 2, 0);
    turn(&first);
    assert_eq!((used(&first), first.status()), (5, OK_STATUS | 4));
    assert_eq!(second.seen().0, 1);
}

#[test]
fn masked_interrupts_and_early_doorbells_are_kept() {
    let first = driver(false, &QUEUES);
    first.msix();
    first.w(0x8000 + 16 + 12, 4, 1);
    first.negotiate();
    first.queue(0, 16, 0x1000, 0x2000, 0x3000);
    first.w(0x6000, 2, 0);
    lock(&first.subscriber.0).queue_interrupts[0].signal_used().unwrap();
    let (second, outcome) = restored(&first, &save(&first));
    outcome.unwrap();
    assert_eq!(second.r(0x4_8000, 8), 2, "pending");
    second.w(0x14, 1, OK_STATUS | 4);
    turn(&second);
    assert_eq!(second.seen().1, 1, "the early doorbell");
    second.w(0x8000 + 16 + 12, 4, 0);
    assert_eq!(second.hypervisor.vectors(0).unwrap().triggered(1), 1);
}

#[test]
fn a_failed_device_waits_for_its_reset() {
    let first = driver(false, &QUEUES);
    first.up();
    first.log.fail_kick.store(1, Ordering::SeqCst);
    first.w(0x6000, 2, 0);
    turn(&first);
    assert_eq!(first.status() & 0x40, 0x40);
    let (second, outcome) = restored(&first, &save(&first));
    outcome.unwrap();
    assert_eq!(second.status(), first.status());
    second.w(0x14, 1, 0);
    second.up();
    assert_eq!(second.status(), OK_STATUS | 4);
}

#[test]
fn states_of_other_devices_are_refused() {
    let first = driver(false, &QUEUES);
    first.up();
    let good = serde_json::to_value(save(&first)).unwrap();
    let cases: [(&str, Value, &str); 8] = [
        ("/queues", json!([]), "0 queues"),
        ("/driver_features", json!(u64::MAX), "offers"),
        ("/driver_features", json!(0), "offers"),
        ("/status", json!(0), "status"),
        ("/phase", json!("Configuring"), "phase"),
        ("/queues/0/size", json!(32), "32 entries"),
        ("/queues/0/desc", json!(MEMORY), "Desc"),
        ("/queues/0/place/next_avail", json!(900), "virtqueue 0"),
    ];
    for (pointer, value, word) in cases {
        let mut state = good.clone();
        *state.pointer_mut(pointer).unwrap() = value;
        let (_, outcome) = restored(&first, &serde_json::from_value(state).unwrap());
        let error = outcome.expect_err(pointer).to_string();
        assert!(error.contains(word), "{pointer}: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn no_state_panics(changes in proptest::collection::vec((0usize..400, any::<u64>(), 0u8..3), 1..6), extra in 0u64..0x10_0000) {
        let first = driver(false, &QUEUES);
        first.up();
        let mut state = serde_json::to_value(save(&first)).unwrap();
        for (at, number, kind) in changes {
            let mut leaves = Vec::new();
            collect(&mut state, &mut leaves);
            let count = leaves.len();
            let leaf = &mut leaves[at % count];
            **leaf = match kind {
                0 => json!(number),
                1 => json!(number % 4),
                _ => json!(extra),
            };
        }
        if let Ok(state) = serde_json::from_value::<TransportState>(state) {
            let (d, _) = restored(&first, &state);
            // Also after a failed restore, which ends the pod.
            turn(&d);
            offer(&d, 1);
            for index in 0..2 {
                lock(&d.subscriber.0).write_bar(0, 0x6000 + 4 * index, &[0, 0]);
            }
            turn(&d);
            lock(&d.subscriber.0).write_bar(0, 0x14, &[0]);
        }
    }
}

fn collect<'v>(value: &'v mut Value, leaves: &mut Vec<&'v mut Value>) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(|v| collect(v, leaves)),
        Value::Object(map) => map.values_mut().for_each(|v| collect(v, leaves)),
        leaf => leaves.push(leaf),
    }
}
