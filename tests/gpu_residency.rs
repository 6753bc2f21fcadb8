//! What does not stay in the GPU's memory changes nothing: every golden call and whole runs
//! give the same bits when all matrices are streamed and all carried frames wait on the host, in
//! its memory, in the scratch file or half in each.

mod common;

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use common::golden::Golden;
use common::goldens;
use common::networks::{Comparison, transformer_calls, vae_calls};
use common::runs::{checkpoint, encoded, open_on, repeat, shown, with_settings};
use pyraflow::Result;
use pyraflow::exec::cuda::probe;
use pyraflow::exec::{Backend, Cuda, HostRoom, ImaginedGpu, Session};
use pyraflow::graph::{Ahead, Graph, Home, Plan, Residency};
use pyraflow::media::Fit;
use pyraflow::models::vae::{Window, record_decoder, record_encoder};
use pyraflow::pipeline::{FirstImage, Networks, Request, plan};
use pyraflow::tensor::{DType, WeightSource};

/// A GPU with other ideas of what stays, or with less memory, than it is asked for.
struct Restricted {
    gpu: Cuda,
    /// What stays, whatever is asked for.
    residency: Option<Residency>,
    /// What is said to be free.
    memory: Option<u64>,
}

impl Restricted {
    fn staying(gpu: &Cuda, residency: &Residency) -> Box<dyn Backend> {
        let (gpu, residency) = (gpu.clone(), Some(residency.clone()));
        Box::new(Restricted { gpu, residency, memory: None })
    }

    fn within(gpu: &Cuda, memory: u64) -> Box<dyn Backend> {
        Box::new(Restricted { gpu: gpu.clone(), residency: None, memory: Some(memory) })
    }
}

impl Backend for Restricted {
    fn name(&self) -> &'static str {
        self.gpu.name()
    }

    fn description(&self) -> String {
        self.gpu.description()
    }

    fn activations(&self) -> DType {
        self.gpu.activations()
    }

    fn plan(&self, graph: &Graph, asked: &Residency) -> Plan {
        self.gpu.plan(graph, self.residency.as_ref().unwrap_or(asked))
    }

    fn free_memory(&self) -> Option<u64> {
        self.memory.or_else(|| self.gpu.free_memory())
    }

    fn copies_weights(&self) -> bool {
        true
    }

    fn open_with(
        &self,
        weights: Arc<dyn WeightSource>,
        asked: &Residency,
    ) -> Result<Box<dyn Session>> {
        self.gpu.open_with(weights, self.residency.as_ref().unwrap_or(asked))
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

/// Calls on the backends that it is given.
type Calls<'a> = &'a dyn Fn(Make<'_>) -> Vec<Comparison>;

/// The GPU, if there is one.
fn gpu() -> Option<Cuda> {
    match probe::require(None) {
        Ok(_) => Some(Cuda::open(None).expect("the GPU that was found")),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

/// The GPU with pieces of `slot` bytes on the way to the scratch file, which is where
/// PYRAFLOW_SCRATCH says, else beside this test: the folder for temporary files may be in memory.
fn with_scratch(gpu: &Cuda, slot: usize) -> Cuda {
    let named = std::env::var_os("PYRAFLOW_SCRATCH").map(PathBuf::from);
    let test = std::env::current_exe().expect("this test");
    let folder = named.or_else(|| test.parent().map(PathBuf::from));
    gpu.clone().with_host(HostRoom::new(None, folder)).with_slots(slot)
}

/// Checks that `calls` give the same bits on what `make` makes as they give on the GPU.
fn compare(expected: &[Comparison], calls: Calls<'_>, make: Make<'_>, how: &str) {
    let found = calls(make);
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let same = found.found.iter().zip(&expected.found).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same && found.found.len() == expected.found.len(), "{}, {how}", found.what);
    }
    println!("{} results the same to the bit, {how}", found.len());
}

/// What `calls` give as usual.
fn as_usual(gpu: &Cuda, calls: Calls<'_>) -> Vec<Comparison> {
    let expected = calls(&|| Box::new(gpu.clone()));
    assert!(!expected.is_empty(), "{} holds nothing to compare", goldens().display());
    expected
}

/// Runs `calls` as usual and with nothing that stays.
fn same_bits(calls: impl Fn(Make<'_>) -> Vec<Comparison>) {
    let Some(gpu) = gpu() else { return };
    let expected = as_usual(&gpu, &calls);
    for ahead in AHEAD {
        let residency = Residency::nothing_stays(Home::Host, ahead);
        let make = || Restricted::staying(&gpu, &residency);
        compare(&expected, &calls, &make, &format!("{ahead:?}"));
    }
}

/// Bytes that go to the scratch file at a time: some that no state is a multiple of, some that
/// the largest ones are, and more than any state of the goldens has.
const SLOTS: [usize; 3] = [10_007, 64 << 10, 16 << 20];

/// The graphs of the goldens' VAEs, all of which carry frames from one window to the next.
fn carrying() -> Vec<Graph> {
    let graphs = FAMILIES.iter().flat_map(|family| {
        let checkpoint = checkpoint(&goldens().join(family), None);
        let config = checkpoint.vae().expect("VAE configuration");
        let window = |frames, [height, width]: [usize; 2]| Window {
            continues: true,
            carries: true,
            at_once: 1,
            ..Window::whole(frames, height, width)
        };
        let decoder = record_decoder(config, window(1, [8, 12]), DType::Bf16);
        [decoder, record_encoder(config, window(8, [64, 96]), DType::Bf16)]
    });
    graphs.collect::<Result<_>>().expect("graphs")
}

/// The names of the states of `graphs`, and the bytes of the largest of each.
fn states(graphs: &[Graph]) -> BTreeMap<String, usize> {
    let mut states = BTreeMap::new();
    for graph in graphs {
        for state in graph.nodes().iter().filter_map(|node| node.state) {
            let tensor = graph.tensor(state);
            let most = states.entry(tensor.name.clone()).or_default();
            *most = (tensor.len() * tensor.dtype.bytes()).max(*most);
        }
    }
    states
}

/// No state of these names stays: every second one is in the scratch file, and the others are in
/// memory.
fn half_in_file(names: impl IntoIterator<Item = String>, ahead: Ahead) -> Residency {
    let home = |at| if at % 2 == 0 { Home::File } else { Home::Host };
    let states = names.into_iter().enumerate().map(|(at, name)| (name, home(at)));
    Residency::new(HashSet::new(), states.collect(), ahead)
}

#[test]
fn states_of_the_goldens_are_large_and_small_and_in_both_places() {
    let states = states(&carrying());
    let residency = half_in_file(states.keys().cloned(), AHEAD[0]);
    for home in [Home::File, Home::Host] {
        let sizes = states.iter().filter(|(name, _)| residency.home(name) == home);
        let sizes: Vec<usize> = sizes.map(|(_, &bytes)| bytes).collect();
        assert!(sizes.len() > 5, "{home:?}: {sizes:?}");
        // Several pieces for both legs of the way, and less than one.
        assert!(sizes.iter().any(|&bytes| bytes > 4 * SLOTS[1]), "{home:?}: {sizes:?}");
        assert!(sizes.iter().all(|&bytes| bytes < SLOTS[2] && bytes % SLOTS[0] != 0));
    }
}

/// Runs `calls` as usual, with all and with half of the carried frames in the scratch file.
fn same_bits_from_the_file(calls: impl Fn(Make<'_>) -> Vec<Comparison>) {
    let Some(gpu) = gpu() else { return };
    let expected = as_usual(&gpu, &calls);
    let names: Vec<String> = states(&carrying()).into_keys().collect();
    for ahead in AHEAD {
        for (slot, residency, share) in SLOTS.iter().flat_map(|&slot| {
            let all = Residency::nothing_stays(Home::File, ahead);
            [(slot, all, "all"), (slot, half_in_file(names.clone(), ahead), "half")]
        }) {
            let gpu = with_scratch(&gpu, slot);
            let make = || Restricted::staying(&gpu, &residency);
            let how = format!("{share} in the file by {slot} bytes, {ahead:?}");
            compare(&expected, &calls, &make, &how);
        }
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
fn vae_from_the_file() {
    same_bits_from_the_file(|backend| vae_calls(&*backend()).unwrap_or_default());
}

/// The latents and frames of whole runs.
fn runs(backend: Make<'_>) -> Vec<Comparison> {
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
}

#[test]
fn whole_runs() {
    same_bits(runs);
}

#[test]
fn whole_runs_from_the_file() {
    same_bits_from_the_file(runs);
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

/// A run of the built-in model that is recorded beside the goldens.
fn demo_golden(name: &str) -> Golden {
    let path = goldens().with_file_name("goldens-demo").join(format!("{name}.safetensors"));
    Golden::open(&path).unwrap_or_else(|| panic!("{} is missing", path.display()))
}

/// The latents and frames of the built-in model, from text alone and from an image.
fn demo_runs(backend: Make<'_>) -> Vec<Comparison> {
    let folder = pyraflow::demo::folder().expect("the built-in model");
    let runs = ["t2v", "i2v"].into_iter().flat_map(|name| {
        let golden = demo_golden(name);
        let pipeline = open_on(&folder, golden.setting("variant"), backend());
        let (latents, frames) = repeat(name, &golden, &pipeline);
        [latents, shown(&format!("{name} frames"), &golden, &frames)]
    });
    runs.collect()
}

#[test]
fn demo_model() {
    same_bits(demo_runs);
}

/// Within as little memory as the run can be planned for, and a little more each time.
#[test]
fn demo_model_within_limits() {
    let Some(gpu) = gpu() else { return };
    let expected = as_usual(&gpu, &demo_runs);
    let checkpoint = checkpoint(&pyraflow::demo::folder().expect("the built-in model"), None);
    let networks = Networks::of(&checkpoint).expect("networks");
    let least_of = |name: &str| {
        let image = (name == "i2v").then(|| FirstImage { path: name.into(), fit: Fit::Crop });
        let request = Request::new(&checkpoint, "a red circle moves left", image);
        let request = with_settings(&demo_golden(name), request);
        let smallest = ImaginedGpu { memory: 0, host: None };
        let phases = plan(&networks, &request, &smallest, None).expect("a plan");
        phases.iter().map(|phase| phase.device_bytes).max().expect("phases")
    };
    let least = least_of("t2v").max(least_of("i2v"));
    for more in [0, 1, 2, 4, 8, 16, 1024] {
        let make = || Restricted::within(&gpu, least + (more << 20));
        compare(&expected, &demo_runs, &make, &format!("{more} MiB above the least"));
    }
}
