//! Reports, certificate tables and certificates from anywhere: parsing and verification never panic, and nothing but
//! what the key signed is believed.
#![no_main]

use std::sync::{Arc, OnceLock};

use libfuzzer_sys::fuzz_target;
use podvisor_snp::chain::SigningChain;
use podvisor_snp::chain::x509::{Vcek, subject};
use podvisor_snp::verify::{Certificates, Expectations, Roots, verify};

fn chain() -> Arc<SigningChain> {
    static CHAIN: OnceLock<Arc<SigningChain>> = OnceLock::new();
    Arc::clone(CHAIN.get_or_init(|| SigningChain::test_chain().expect("the shipped chain")))
}

fuzz_target!(|data: &[u8]| {
    let _ = subject(data);
    let _ = Vcek::parse(data);
    let (report, table) = data.split_at(data.len().min(1184));
    let expected = Expectations::default();
    if let Ok(certificates) = Certificates::from_table(table) {
        let _ = verify(report, &certificates, &expected, &Roots::emulated());
    }
    let ours = chain();
    let swapped = Certificates { ask: ours.ask.clone(), vcek: data.to_vec() };
    let mut padded = [0; 1184];
    padded[..report.len()].copy_from_slice(report);
    assert!(verify(&padded, &swapped, &expected, &Roots::none()).is_err());
    let _ = verify(&padded, &swapped, &expected, &Roots::emulated());
    let good = Certificates { ask: ours.ask.clone(), vcek: ours.vcek.clone() };
    let _ = verify(&padded, &good, &expected, &Roots::emulated());
});
