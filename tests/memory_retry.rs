//! A device whose memory runs out in the middle of a run: the run is planned again and ends
//! with the same latents, or ends with an error when there is never enough.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pyraflow::checkpoint::{Checkpoint, StoreOptions};
use pyraflow::exec::{Backend, Cpu, GraphId, Pending, Session};
use pyraflow::graph::{Graph, Plan, Residency, TensorId};
use pyraflow::pipeline::{Event, Pipeline, Reporter, Request};
use pyraflow::sampler::{Latent, PhiloxNoise};
use pyraflow::tensor::{DType, WeightSource};
use pyraflow::{Error, ErrorKind, Result};

/// The CPU, with sessions that run out of memory after so many graphs were added.
struct Scarce {
    graphs: usize,
    opened: Arc<AtomicUsize>,
    /// Sessions that run out; the ones after them do not.
    failing: usize,
}

impl Backend for Scarce {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn description(&self) -> String {
        "a CPU with little memory".into()
    }

    fn activations(&self) -> DType {
        Cpu::new().activations()
    }

    fn plan(&self, graph: &Graph, residency: &Residency) -> Plan {
        Cpu::new().plan(graph, residency)
    }

    fn free_memory(&self) -> Option<u64> {
        None
    }

    fn copies_weights(&self) -> bool {
        false
    }

    fn open_with(
        &self,
        weights: Arc<dyn WeightSource>,
        residency: &Residency,
    ) -> Result<Box<dyn Session>> {
        let fails = self.opened.fetch_add(1, Ordering::Relaxed) < self.failing;
        let left = if fails { self.graphs } else { usize::MAX };
        Ok(Box::new(Running { session: Cpu::new().open_with(weights, residency)?, left }))
    }
}

struct Running {
    session: Box<dyn Session>,
    left: usize,
}

impl Session for Running {
    fn add(&mut self, graph: Graph) -> Result<GraphId> {
        self.left = self.left.checked_sub(1).ok_or_else(|| Error::memory("none is left"))?;
        self.session.add(graph)
    }

    fn remove(&mut self, graph: GraphId) {
        self.session.remove(graph);
    }

    fn find(&self, graph: GraphId, name: &str) -> Result<TensorId> {
        self.session.find(graph, name)
    }

    fn write(&mut self, graph: GraphId, input: TensorId, data: &[f32]) -> Result<()> {
        self.session.write(graph, input, data)
    }

    fn write_ids(&mut self, graph: GraphId, input: TensorId, ids: &[u32]) -> Result<()> {
        self.session.write_ids(graph, input, ids)
    }

    fn copy(
        &mut self,
        from: (GraphId, TensorId),
        first: usize,
        to: (GraphId, TensorId),
    ) -> Result<()> {
        self.session.copy(from, first, to)
    }

    fn run(&mut self, graph: GraphId) -> Result<()> {
        self.session.run(graph)
    }

    fn read(&mut self, graph: GraphId, tensor: TensorId) -> Result<Vec<f32>> {
        self.session.read(graph, tensor)
    }

    fn fetch_pixels(&mut self, graph: GraphId, tensor: TensorId) -> Result<Pending<Vec<u8>>> {
        self.session.fetch_pixels(graph, tensor)
    }

    fn time(&mut self, graph: GraphId, repeats: usize) -> Result<Vec<f64>> {
        self.session.time(graph, repeats)
    }

    fn profile(&mut self, graph: GraphId) -> Result<Vec<f64>> {
        self.session.profile(graph)
    }
}

/// Counts warnings.
#[derive(Default)]
struct Warnings(usize);

impl Reporter for Warnings {
    fn event(&mut self, event: &Event) {
        self.0 += usize::from(matches!(event, Event::Warning { .. }));
    }
}

/// Samples three units with sessions of which the first `failing` have room for `graphs`.
/// What comes of it, how many sessions were opened for the transformer, and the warnings.
fn sample(graphs: usize, failing: usize) -> (Result<Vec<Latent>>, usize, usize) {
    let folder = pyraflow::demo::folder().expect("the built-in model");
    let checkpoint = Checkpoint::open(&folder, None).expect("checkpoint");
    let opened = Arc::new(AtomicUsize::new(0));
    let store = tempfile::tempdir().expect("folder");
    let open = |backend: Box<dyn Backend>| {
        let options = StoreOptions::below(store.path());
        Pipeline::open(checkpoint.clone(), backend, &options, &mut Warnings::default())
    };
    let mut request = Request::new(&checkpoint, "a red circle moves to the right", None);
    request.units = 3;
    (request.steps, request.video_steps) = ([1; 3], [1; 3]);
    let calm = open(Box::new(Cpu::new())).expect("pipeline");
    let tokens = calm.tokenize(&request).expect("tokens");
    let prompts = calm.encode_prompts(&tokens, &mut Warnings::default()).expect("prompts");
    let scarce = Scarce { graphs, opened: opened.clone(), failing };
    let pipeline = open(Box::new(scarce)).expect("pipeline");
    let (mut noise, mut warnings) = (PhiloxNoise { seed: 5 }, Warnings::default());
    let latents = pipeline.sample(&request, &prompts, Vec::new(), &mut noise, None, &mut warnings);
    (latents, opened.load(Ordering::Relaxed), warnings.0)
}

#[test]
fn a_run_goes_on_with_what_is_left() {
    let (expected, opened, warnings) = sample(usize::MAX, 0);
    let expected = expected.expect("latents");
    assert_eq!((expected.len(), opened, warnings), (3, 1, 0));
    // Table, entrances and three stages to a unit: it ends in the second unit, or at once.
    for graphs in [8, 2] {
        let (latents, opened, warnings) = sample(graphs, 1);
        let latents = latents.expect("latents");
        assert_eq!((opened, warnings), (2, 1), "{graphs} graphs");
        for (found, expected) in latents.iter().zip(&expected) {
            assert_eq!(found.data(), expected.data(), "{graphs} graphs");
        }
    }
}

#[test]
fn a_run_ends_where_there_is_never_enough() {
    let (latents, opened, warnings) = sample(2, usize::MAX);
    assert_eq!(latents.expect_err("no memory").kind(), ErrorKind::Memory);
    assert_eq!((opened, warnings), (3, 2));
}
