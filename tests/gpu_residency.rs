//! What does not stay in the GPU's memory changes nothing: every golden call and whole runs
//! give the same bits when all matrices are streamed and all carried frames wait on the host.

mod common;

use std::sync::Arc;

use common::golden::Golden;
use common::goldens;
use common::networks::{Comparison, transformer_calls, vae_calls};
use common::runs::{encoded, open_on, repeat, shown};
use pyraflow::Result;
use pyraflow::exec::cuda::probe;
use pyraflow::exec::{Backend, Cuda, Session};
use pyraflow::graph::{Ahead, Graph, Plan, Residency};
use pyraflow::tensor::{DType, WeightSource};

/// A GPU on which nothing stays, whatever it is asked for.
struct Streaming {
    gpu: Cuda,
    residency: Residency,
}

impl Backend for Streaming {
    fn name(&self) -> &'static str {
        self.gpu.name()
    }

    fn description(&self) -> String {
        self.gpu.description()
    }

    fn activations(&self) -> DType {
        self.gpu.activations()
    }

    fn plan(&self, graph: &Graph, _: &Residency) -> Plan {
        self.gpu.plan(graph, &self.residency)
    }

    fn free_memory(&self) -> Option<u64> {
        self.gpu.free_memory()
    }

    fn copies_weights(&self) -> bool {
        true
    }

    fn open_with(&self, weights: Arc<dyn WeightSource>, _: &Residency) -> Result<Box<dyn Session>> {
        self.gpu.open_with(weights, &self.residency)
    }
}

/// How far transfers may be from their nodes: just in time, a few matrices, everything.
const AHEAD: [Ahead; 4] = [
    Ahead { bytes: 0, nodes: 1 },
    Ahead { bytes: 100 << 10, nodes: 4 },
    Ahead::bytes(100 << 10),
    Ahead::bytes(1 << 40),
];

/// Makes a backend of the kind that is to be compared.
type Make<'a> = &'a dyn Fn() -> Box<dyn Backend>;

/// Runs `calls` as usual and with nothing that stays.
fn same_bits(calls: impl Fn(Make<'_>) -> Vec<Comparison>) {
    if let Err(error) = probe::require(None) {
        println!("skipped: {error}");
        return;
    }
    let gpu = Cuda::open(None).expect("the GPU that was found");
    let expected = calls(&|| Box::new(gpu.clone()));
    assert!(!expected.is_empty(), "{} holds nothing to compare", goldens().display());
    for ahead in AHEAD {
        let residency = Residency::nothing_stays(ahead);
        let streaming = || Streaming { gpu: gpu.clone(), residency: residency.clone() };
        let found = calls(&|| Box::new(streaming()));
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            let same =
                found.found.iter().zip(&expected.found).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same && found.found.len() == expected.found.len(), "{}, {ahead:?}", found.what);
        }
        println!("{} results the same to the bit, {ahead:?}", found.len());
    }
}

const FAMILIES: [&str; 2] = ["sd3", "flux"];

#[test]
fn transformers() {
    same_bits(|backend| {
        let calls = FAMILIES.iter().flat_map(|family| {
            let folder = goldens().join(family);
            let golden = Golden::open(&folder.join("transformer.safetensors"));
            golden.map(|g| transformer_calls(&folder, &g, &*backend())).unwrap_or_default()
        });
        calls.collect()
    });
}

#[test]
fn vae() {
    same_bits(|backend| vae_calls(&*backend()).unwrap_or_default());
}

#[test]
fn whole_runs() {
    same_bits(|backend| {
        let runs = FAMILIES.iter().flat_map(|family| {
            let folder = goldens().join(family);
            let Some(golden) = Golden::open(&folder.join("t2v.safetensors")) else {
                return Vec::new();
            };
            let pipeline = open_on(&folder, golden.setting("variant"), backend());
            let (latents, frames) = repeat(family, &golden, &pipeline);
            vec![latents, shown(&format!("{family} frames"), &golden, &frames)]
        });
        runs.collect()
    });
}

#[test]
fn text_encoders() {
    same_bits(|backend| {
        let calls = FAMILIES.iter().flat_map(|family| {
            let folder = goldens().join(family);
            let golden = Golden::open(&folder.join("text.safetensors"));
            golden.map(|g| encoded(family, &folder, &g, backend())).unwrap_or_default()
        });
        calls.collect()
    });
}
