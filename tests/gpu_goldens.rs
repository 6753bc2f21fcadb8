//! The goldens on a GPU: how far its results are from the published implementation's in f32,
//! beside what rounding to bf16 costs on the CPU at the same places.

mod common;

use common::golden::{Golden, relative_error};
use common::goldens;
use common::networks::{Comparison, transformer_calls, vae_calls};
use common::runs::{encoded, open_on, repeat, shown};
use pyraflow::exec::cuda::{Gemm, probe};
use pyraflow::exec::{Backend, Cpu, Cuda};

/// How much larger than the CPU's error when it rounds to bf16 a GPU's may be.
const FACTOR: f64 = 1.5;

/// The GPU's backends, all kernels and those that every GPU runs; none, and why is said, where
/// there is no GPU.
fn gpus() -> Vec<(&'static str, Cuda)> {
    if let Err(error) = probe::require(None) {
        println!("skipped: {error}");
        return Vec::new();
    }
    let cuda = Cuda::open(None).expect("the GPU that was found");
    vec![
        ("generic kernels", cuda.clone().generic()),
        ("own kernels", cuda.clone().with_gemm(Gemm::Own)),
        ("as it comes", cuda),
    ]
}

fn compare(device: &str, cpu: &[Comparison], gpu: &[Comparison]) {
    let mut worse = Vec::new();
    for (cpu, gpu) in cpu.iter().zip(gpu) {
        let rounding = relative_error(&cpu.found, &cpu.golden);
        let error = relative_error(&gpu.found, &gpu.golden);
        let ratio = error / rounding;
        println!("{:<44} {device:<22} {error:.3e}  cpu {rounding:.3e}  {ratio:.2}x", gpu.what);
        if ratio.is_nan() || ratio > FACTOR {
            worse.push(format!("{}: {ratio:.2}", gpu.what));
        }
    }
    assert_eq!(cpu.len(), gpu.len());
    assert!(worse.is_empty(), "{device}: more than {FACTOR} times the error of bf16: {worse:?}");
}

/// Makes a backend of the kind that is to be compared.
type Make<'a> = &'a dyn Fn() -> Box<dyn Backend>;

/// Runs `calls` on the CPU, rounding, and on every GPU backend.
fn on_all(calls: impl Fn(Make<'_>) -> Vec<Comparison>) {
    let gpus = gpus();
    if gpus.is_empty() {
        return;
    }
    let cpu = calls(&|| Box::new(Cpu::rounding_to_bf16()));
    assert!(!cpu.is_empty(), "{} holds nothing to compare", goldens().display());
    for (name, gpu) in gpus {
        compare(name, &cpu, &calls(&|| Box::new(gpu.clone())));
    }
}

const FAMILIES: [&str; 2] = ["sd3", "flux"];

#[test]
fn transformers() {
    for family in FAMILIES {
        let folder = goldens().join(family);
        if let Some(golden) = Golden::open(&folder.join("transformer.safetensors")) {
            on_all(|backend| transformer_calls(&folder, &golden, &*backend()));
        }
    }
}

#[test]
fn vae() {
    on_all(|backend| vae_calls(&*backend()).unwrap_or_default());
}

#[test]
fn text_encoders() {
    on_all(|backend| {
        let calls = FAMILIES.iter().flat_map(|family| {
            let folder = goldens().join(family);
            let golden = Golden::open(&folder.join("text.safetensors"));
            golden.map(|g| encoded(family, &folder, &g, backend())).unwrap_or_default()
        });
        calls.collect()
    });
}

fn whole_runs(backend: Make<'_>, name: &str) -> Vec<Comparison> {
    let mut comparisons = Vec::new();
    for family in FAMILIES {
        let folder = goldens().join(family);
        let recorded = folder.join(format!("{name}.safetensors"));
        let Some(golden) = Golden::open(&recorded) else { continue };
        let pipeline = open_on(&folder, golden.setting("variant"), backend());
        let (latents, frames) = repeat(&format!("{family} {name}"), &golden, &pipeline);
        comparisons.push(latents);
        if golden.has("frames") {
            comparisons.push(shown(&format!("{family} {name} frames"), &golden, &frames));
        }
    }
    comparisons
}

macro_rules! runs {
    ($($name:ident),*) => {$(
        #[test]
        fn $name() {
            on_all(|backend| whole_runs(backend, stringify!($name)));
        }
    )*};
}

runs!(t2v, i2v, t2i, t2v_linear_guidance, t2v_no_guidance);
