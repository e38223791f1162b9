//! The pod guest's IGVM image (`resources/guest`), which `build.rs` makes and the monitor carries: the demo, the tests and
//! the benchmarks all boot it. See `docs/pod-guest.md`.

/// The image: platforms native and SEV-SNP.
pub const POD_IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pod.igvm"));

#[cfg(test)]
mod tests {
    use podvisor_firmware::igvm::{PlanOptions, plan};
    use podvisor_firmware::plan::{PageKind, Platform, Step};
    use podvisor_firmware::vmsa::kvm_reproducible;

    use super::*;

    fn plan_for(platform: Platform) -> podvisor_firmware::plan::LaunchPlan<'static> {
        plan(
            POD_IMAGE,
            &PlanOptions {
                platform: Some(platform),
                ..PlanOptions::default()
            },
        )
        .unwrap()
    }

    #[test]
    fn both_platforms_load_the_same_pages() {
        let pages = |platform| -> Vec<_> {
            let is_code = |step: &Step<'_>| {
                matches!(
                    step,
                    Step::Pages {
                        kind: PageKind::Normal,
                        ..
                    }
                )
            };
            plan_for(platform).steps.into_iter().filter(is_code).collect()
        };
        assert!(!pages(Platform::Native).is_empty());
        assert_eq!(pages(Platform::Native), pages(Platform::SevSnp));
    }

    #[test]
    fn kvm_builds_the_vmsa_that_is_measured() {
        let plan = plan_for(Platform::SevSnp);
        assert_eq!(plan.vps.len(), 1);
        let state = kvm_reproducible(&plan.vps[0].vmsa).unwrap();
        assert_eq!(state.rip, plan.vps[0].state.rip);
        assert_eq!(plan.policy, Some(0x3_0000));
    }

    #[test]
    fn the_image_is_small() {
        assert!(POD_IMAGE.len() < 300 << 10, "{} bytes", POD_IMAGE.len());
    }

    #[test]
    fn no_path_of_the_build_machine_is_in_it() {
        for needle in [env!("CARGO_MANIFEST_DIR"), env!("OUT_DIR")] {
            assert!(
                !POD_IMAGE
                    .windows(needle.len())
                    .any(|window| window == needle.as_bytes()),
                "{needle}"
            );
        }
    }
}
