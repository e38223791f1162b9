//! A segment with functions that record where they are.

use super::*;

const W64: Window = Window {
    start: 0x100_0000_0000,
    len: 4 << 30,
};
const W32: Window = Window {
    start: 0xC000_0000,
    len: 640 << 20,
};

struct Probe {
    id: String,
    config: ConfigSpace,
    at: Option<u64>,
    moves: usize,
    detached: bool,
    byte: u8,
}

fn probe(id: &str, size: u64) -> Arc<Mutex<Probe>> {
    let mut config = ConfigSpace::new(&Identity {
        vendor: 0x1AF4,
        device: 0x1042,
        ..HOST_BRIDGE
    });
    config.add_bar(0, size, false).unwrap();
    Arc::new(Mutex::new(Probe {
        id: id.to_owned(),
        config,
        at: None,
        moves: 0,
        detached: false,
        byte: 0,
    }))
}

impl PciFunction for Probe {
    fn id(&self) -> &str {
        &self.id
    }
    fn config(&self) -> &ConfigSpace {
        &self.config
    }
    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }
    fn read_bar(&mut self, _bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(self.byte.wrapping_add(offset as u8));
    }
    fn write_bar(&mut self, _bar: usize, _offset: u64, data: &[u8]) {
        self.byte = data[0];
    }
    fn bar_mapped(&mut self, _bar: usize, address: Option<u64>) {
        self.at = address;
        self.moves += 1;
    }
    fn detach(&mut self) {
        self.detached = true;
    }
    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("moves", self.moves as u64)]
    }
}

fn root() -> (Arc<Bus>, Arc<PciRoot>) {
    let bus = Arc::new(Bus::new());
    let root = PciRoot::new(0, Arc::clone(&bus), W64, W32);
    (bus, root)
}

fn w32(root: &PciRoot, slot: u8, at: u16, v: u32) {
    root.write_config(slot, 0, at, &v.to_le_bytes());
}

fn set_bar(root: &PciRoot, slot: u8, address: u64) {
    w32(root, slot, 0x10, address as u32);
    w32(root, slot, 0x14, (address >> 32) as u32);
}

#[test]
fn functions_get_slots_in_order_and_distinct_bars() {
    let (_, root) = root();
    let mut seen = Vec::new();
    for i in 1..32u8 {
        let p = probe(&format!("p{i}"), 0x8_0000);
        let bdf = root.add(p.clone(), None).unwrap();
        assert_eq!(bdf.slot, i);
        let at = lock(&p).config.bar_address(0);
        assert!(W64.contains(at, 0x8_0000) && at.is_multiple_of(0x8_0000) && !seen.contains(&at));
        seen.push(at);
    }
    assert_eq!(root.add(probe("x", 4096), None), Err(PciError::Full(0)));
    assert_eq!(root.find("p7").unwrap().to_string(), "0000:00:07.0");
    root.remove(7).unwrap();
    assert_eq!(root.add(probe("x", 4096), Some(7)).unwrap().slot, 7);
    assert_eq!(root.add(probe("y", 4096), Some(7)), Err(PciError::Slot { slot: 7 }));
    assert_eq!(root.add(probe("y", 4096), Some(0)), Err(PciError::Slot { slot: 0 }));
    assert_eq!(root.add(probe("y", 4096), Some(32)), Err(PciError::Slot { slot: 32 }));
}

#[test]
fn windows_are_filled_64_bit_first_and_then_refused() {
    let bus = Arc::new(Bus::new());
    let small = |start| Window { start, len: 0x2000 };
    let root = PciRoot::new(0, bus, small(0x100_0000_1000), small(0xC000_0000));
    let mut places = Vec::new();
    for i in 0..4 {
        let p = probe(&format!("p{i}"), 0x1000);
        root.add(p.clone(), None).unwrap();
        places.push(lock(&p).config.bar_address(0));
    }
    assert_eq!(places, [0x100_0000_1000, 0x100_0000_2000, 0xC000_0000, 0xC000_1000]);
    let refused = PciError::Room { bar: 0, size: 0x1000 };
    assert_eq!(root.add(probe("no", 0x1000), None), Err(refused));
    assert_eq!(root.find("no"), None);
}

#[test]
fn ecam_and_ports_show_the_same_functions() {
    let (_, root) = root();
    root.add(probe("a", 0x1000), Some(5)).unwrap();
    let (ecam, ports) = (root.ecam(), root.config_ports());
    let (mut e, mut p) = (lock(&ecam), lock(&ports));
    let mut d = [0; 4];
    e.read(0, &mut d);
    assert_eq!(d, [0x86, 0x80, 0x57, 0x0D]);
    e.read(5 << 15, &mut d);
    assert_eq!(d, [0xF4, 0x1A, 0x42, 0x10]);
    for absent in [5 << 15 | 1 << 12, 6 << 15, 1 << 20, u64::MAX] {
        e.read(absent, &mut d);
        assert_eq!(d, [0xFF; 4], "{absent:#x}");
    }
    e.read(5 << 15 | 0x100, &mut d);
    assert_eq!(d, [0; 4], "no extended capabilities");
    p.write(0, &(0x8000_0000u32 | 5 << 11).to_le_bytes());
    p.read(4, &mut d);
    assert_eq!(d, [0xF4, 0x1A, 0x42, 0x10]);
    let mut half = [0; 2];
    p.read(6, &mut half);
    assert_eq!(half, [0x42, 0x10]);
    p.read(0, &mut d);
    assert_eq!(u32::from_le_bytes(d), 0x8000_0000 | 5 << 11);
    for off in [5u32 << 11, 0x8001_0000 | 5 << 11] {
        p.write(0, &off.to_le_bytes());
        p.read(4, &mut d);
        assert_eq!(d, [0xFF; 4], "disabled, or another bus");
    }
    p.write(1, &[0xFF]);
    p.write(0, &[0xFF; 3]);
    p.write(4, &[0xFF; 4]);
}

#[test]
fn a_bar_follows_enable_disable_and_moves() {
    let (bus, root) = root();
    let p = probe("a", 0x1000);
    let slot = root.add(p.clone(), None).unwrap().slot;
    let first = lock(&p).config.bar_address(0);
    let mut d = [0];
    assert!(!bus.read(first, &mut d));
    w32(&root, slot, 4, 2);
    assert!(bus.write(first + 8, &[3]));
    assert!(bus.read(first + 2, &mut d));
    assert_eq!(d, [5]);
    set_bar(&root, slot, 0xC100_0000);
    assert!(!bus.read(first, &mut d) && bus.read(0xC100_0FFF, &mut d));
    assert_eq!(lock(&p).at, Some(0xC100_0000));
    // Sizing with decoding on, and places outside the windows: nowhere, and no other device is shadowed.
    for bad in [
        u64::MAX,
        0,
        0xFEE0_0000,
        0xC000_0000 + (640 << 20),
        W64.start + W64.len - 0x800,
    ] {
        set_bar(&root, slot, bad);
        let there = W64.contains(bad & !0xFFF, 0x1000);
        assert_eq!(lock(&p).at.is_some(), there, "{bad:#x}");
    }
    set_bar(&root, slot, first);
    assert_eq!(lock(&p).at, Some(first));
    w32(&root, slot, 4, 0);
    assert_eq!((lock(&p).at, bus.ranges().len()), (None, 0));
}

#[test]
fn a_bar_over_another_waits_for_it_to_leave() {
    let (bus, root) = root();
    let (a, b) = (probe("a", 0x1000), probe("b", 0x1000));
    root.add(a.clone(), Some(1)).unwrap();
    root.add(b.clone(), Some(2)).unwrap();
    w32(&root, 1, 4, 2);
    w32(&root, 2, 4, 2);
    let (at_a, at_b) = (lock(&a).at.unwrap(), lock(&b).at.unwrap());
    set_bar(&root, 1, at_b);
    assert_eq!((lock(&a).at, lock(&b).at), (None, Some(at_b)));
    set_bar(&root, 2, at_a);
    assert_eq!((lock(&a).at, lock(&b).at), (Some(at_b), Some(at_a)));
    root.remove(2).unwrap();
    assert!(lock(&b).detached && lock(&b).at.is_none());
    assert_eq!(bus.ranges(), [(at_b, 0x1000)]);
    w32(&root, 2, 4, 0);
    assert_eq!(root.counters().keys().collect::<Vec<_>>(), ["a"]);
}

#[test]
fn a_hot_added_bar_avoids_where_the_guest_moved_others() {
    let (_, root) = root();
    let a = probe("a", 0x1000);
    root.add(a.clone(), None).unwrap();
    let place = lock(&a).config.bar_address(0);
    set_bar(&root, 1, place + 0x1000);
    let b = probe("b", 0x1000);
    root.add(b.clone(), None).unwrap();
    let c = probe("c", 0x1000);
    root.add(c.clone(), None).unwrap();
    assert_eq!(lock(&b).config.bar_address(0), place);
    assert_eq!(lock(&c).config.bar_address(0), place + 0x2000);
}
