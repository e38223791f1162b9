//! What an image costs before its first instruction: parsing and planning, and predicting the digest, against SHA-384
//! over the same bytes. The image has 64 MiB of distinct pages, each with a directive of its own.

use std::borrow::Cow;
use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use podvisor_firmware::igvm::{BuildOptions, PlanOptions, build, plan};
use podvisor_firmware::plan::{LaunchPlan, PageKind, Platform, Step};
use podvisor_snp::digest::{predict, sha384};

const MIB: usize = 64;

/// An image with `MIB` MiB of pages that differ from each other.
#[expect(
    clippy::expect_used,
    reason = "a benchmark whose input cannot be made has nothing to measure"
)]
fn image() -> Vec<u8> {
    let mut contents = vec![0u8; MIB << 20];
    for (number, page) in contents.chunks_mut(4096).enumerate() {
        for (at, byte) in page.iter_mut().enumerate() {
            *byte = (number.wrapping_mul(31) ^ (number >> 8) ^ at.wrapping_mul(7)).to_le_bytes()[0];
        }
        if let Some(start) = page.first_chunk_mut::<8>() {
            *start = (number as u64).to_le_bytes();
        }
    }
    let mut launch = LaunchPlan::new(Platform::SevSnp);
    launch.policy = Some(0x3_0000);
    launch.steps.push(Step::Pages {
        gpa: 0x10_0000,
        len: contents.len() as u64,
        kind: PageKind::Normal,
        data: Cow::Owned(contents),
    });
    build(&[launch], &BuildOptions::default()).expect("the image is valid")
}

#[expect(clippy::expect_used, reason = "as above")]
fn launch(c: &mut Criterion) {
    let image = image();
    let options = PlanOptions::default();
    let mut group = c.benchmark_group(format!("igvm-{MIB}MiB"));
    group.sample_size(10).throughput(Throughput::Bytes(image.len() as u64));
    group.bench_function("sha384-of-the-file", |b| b.iter(|| sha384(black_box(&image))));
    group.bench_function("parse-and-plan", |b| {
        b.iter(|| {
            plan(black_box(&image), &options)
                .expect("the image is valid")
                .steps
                .len()
        });
    });
    let parsed = plan(&image, &options).expect("the image is valid");
    group.bench_function("predict-digest", |b| {
        b.iter(|| predict(black_box(&parsed), 1).expect("the plan is valid").digest);
    });
    group.finish();
}

criterion_group!(benches, launch);
criterion_main!(benches);
