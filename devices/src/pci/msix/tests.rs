//! MSI-X against a counting hypervisor.

use super::*;
use crate::mock::CountedVectors;

fn msix(count: u16) -> (Arc<CountedVectors>, Msix) {
    let vectors = Arc::new(CountedVectors::new(count));
    (Arc::clone(&vectors), Msix::new(count, vectors))
}

fn program(m: &Msix, index: u64, data: u32, masked: bool) {
    m.write_table(index * 16, &0xFEE0_0000u32.to_le_bytes());
    m.write_table(index * 16 + 4, &[0; 4]);
    m.write_table(index * 16 + 8, &data.to_le_bytes());
    m.write_table(index * 16 + 12, &[u8::from(masked), 0, 0, 0]);
}

#[test]
fn a_masked_vector_is_pending_until_it_is_unmasked() {
    let (hv, m) = msix(3);
    program(&m, 1, 0x41, true);
    m.set_control(CONTROL_ENABLE);
    m.trigger(1).unwrap();
    m.trigger(1).unwrap();
    let mut pba = [0; 8];
    m.read_pending(0, &mut pba);
    assert_eq!(pba[0], 0b10);
    assert_eq!(hv.triggered(1), 0);
    m.write_table(16 + 12, &[0; 4]);
    assert_eq!(hv.triggered(1), 1, "two while masked are one");
    m.read_pending(0, &mut pba);
    assert_eq!(pba[0], 0);
    assert_eq!(hv.route(1).unwrap().data, 0x41);
    m.trigger(1).unwrap();
    assert_eq!(hv.triggered(1), 2);
}

#[test]
fn the_function_mask_holds_all_and_disabling_forgets() {
    let (hv, m) = msix(2);
    m.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
    program(&m, 0, 1, false);
    program(&m, 1, 2, false);
    assert_eq!(hv.sets(), 0, "nothing is routed while the function is masked");
    m.trigger(0).unwrap();
    m.set_control(CONTROL_ENABLE);
    assert_eq!((hv.triggered(0), hv.triggered(1), hv.sets()), (1, 0, 2));
    m.set_control(0);
    m.trigger(0).unwrap();
    m.set_control(CONTROL_ENABLE);
    assert_eq!(hv.triggered(0), 1, "what came while MSI-X was off is not sent later");
}

#[test]
fn the_same_value_again_routes_nothing() {
    let (hv, m) = msix(1);
    program(&m, 0, 7, false);
    m.set_control(CONTROL_ENABLE);
    program(&m, 0, 7, false);
    m.set_control(CONTROL_ENABLE);
    assert_eq!(hv.sets(), 1);
}

#[test]
fn accesses_beyond_the_table_do_nothing() {
    let (hv, m) = msix(1);
    m.set_control(CONTROL_ENABLE);
    for at in [16, 12, 13, 1 << 40, u64::MAX] {
        m.write_table(at, &[0xFF; 8]);
        let mut d = [0xEE; 8];
        m.read_table(at.max(16), &mut d);
        assert_eq!(d, [0; 8]);
        m.read_pending(at, &mut d);
    }
    m.trigger(1).unwrap();
    m.trigger(0xFFFF).unwrap();
    assert_eq!(hv.sets(), 0);
    let mut d = [0; 4];
    m.read_table(12, &mut d);
    assert_eq!(d, [1, 0, 0, 0], "reserved control bits stay zero");
}

#[test]
fn a_refused_route_keeps_the_interrupt_pending() {
    let (hv, m) = msix(1);
    hv.refuse(true);
    m.set_control(CONTROL_ENABLE);
    program(&m, 0, 7, false);
    m.trigger(0).unwrap();
    hv.refuse(false);
    m.write_table(8, &8u32.to_le_bytes());
    assert_eq!(hv.triggered(0), 1);
}

#[test]
fn no_interrupt_is_lost_while_a_vcpu_masks_and_unmasks() {
    let (hv, m) = msix(1);
    m.set_control(CONTROL_ENABLE);
    program(&m, 0, 7, false);
    let m = &m;
    for _ in 0..200 {
        let before = hv.triggered(0);
        std::thread::scope(|s| {
            s.spawn(|| m.trigger(0).unwrap());
            m.write_table(12, &[1, 0, 0, 0]);
            m.write_table(12, &[0, 0, 0, 0]);
        });
        assert!(hv.triggered(0) > before, "delivered at the latest when it is unmasked");
    }
}
