//! Graphs that come and go in one session while a GPU works on those before, as the graphs of the
//! sampler's stages do: results are the CPU's to the bit, and memory is used again.

use std::sync::Arc;

use pyraflow::exec::cuda::probe;
use pyraflow::exec::{Backend, Cpu, Cuda, GraphId, Session};
use pyraflow::graph::{Graph, Op, Residency};
use pyraflow::sampler::CHANNELS;
use pyraflow::tensor::{DType, WeightSource, WeightView};
use pyraflow::{Error, ErrorKind, Result};

struct NoWeights;

impl WeightSource for NoWeights {
    fn weight(&self, name: &str) -> Result<WeightView<'_>> {
        Err(Error::model(format!("there is no weight {name}")))
    }
}

/// Rows and columns of what is passed on from graph to graph.
const SIDE: usize = 16;

/// Runs of each graph, which all give the same.
const RUNS: usize = 20;

/// A graph whose results are exact on every device: it makes `y` of `x` and `noise`, and `half`
/// of a frame of `side` rows and columns, so that graphs differ in what they keep.
fn graph(side: usize) -> Graph {
    let mut g = Graph::new();
    let frame =
        |g: &mut Graph, name: &str, side| g.input(name, &[1, side, side, CHANNELS], DType::F32);
    let x = frame(&mut g, "x", SIDE);
    let noise = frame(&mut g, "noise", 2 * SIDE);
    let rest = frame(&mut g, "rest", side);
    let doubled = g.push(Op::DoubleRenoise { alpha: 0.5, beta: 0.25 }, &[x, noise]);
    let y = g.push(Op::HalveBilinear { factor: 1.5 }, &[doubled.expect("shapes fit")]);
    g.mark_output("y", y.expect("shapes fit"));
    let half = g.push(Op::HalveBilinear { factor: 1.0 }, &[rest]);
    g.mark_output("half", half.expect("shapes fit"));
    g
}

fn write(session: &mut dyn Session, graph: GraphId, name: &str, side: usize, seed: usize) {
    let value = |i: usize| ((i * 7919 + seed * 104_729) % 1009) as f32 / 512.0 - 1.0;
    let values: Vec<f32> = (0..side * side * CHANNELS).map(value).collect();
    let input = session.find(graph, name).expect("an input");
    session.write(graph, input, &values).expect("as many values");
}

/// Runs a graph for each of `sides`, each from what the one before gave, and removes it once the
/// next one was queued. Returns the bits of the last results; `after` sees every round.
fn chain(session: &mut dyn Session, sides: &[usize], mut after: impl FnMut(usize)) -> Vec<u32> {
    let mut held = Graph::new();
    let x = held.input("x", &[1, SIDE, SIDE, CHANNELS], DType::F32);
    let holder = (session.add(held).expect("a graph"), x);
    write(session, holder.0, "x", SIDE, 0);
    let mut before: Option<GraphId> = None;
    for (round, &side) in sides.iter().enumerate() {
        let graph = session.add(graph(side)).expect("a graph");
        write(session, graph, "noise", 2 * SIDE, round + 1);
        write(session, graph, "rest", side, round + 2);
        let [x, y] = ["x", "y"].map(|name| session.find(graph, name).expect("a tensor"));
        session.copy(holder, 0, (graph, x)).expect("a copy");
        (0..RUNS).for_each(|_| session.run(graph).expect("a run"));
        session.copy((graph, y), 0, holder).expect("a copy");
        if let Some(removed) = before.replace(graph) {
            session.remove(removed);
            let error = session.run(removed).expect_err("it was removed");
            assert_eq!(error.kind(), ErrorKind::Usage);
            session.remove(removed);
        }
        after(round);
    }
    let last = before.expect("a round");
    let half = session.find(last, "half").expect("an output");
    let mut found = session.read(last, half).expect("values");
    found.extend(session.read(holder.0, holder.1).expect("values"));
    found.iter().map(|v| v.to_bits()).collect()
}

/// Sizes that fall and rise, as those of the stages do, over several units.
fn sides() -> Vec<usize> {
    (0..12).flat_map(|unit| [64, 128, 256].map(|side| side + 8 * unit)).collect()
}

fn on(backend: &dyn Backend, residency: &Residency, after: impl FnMut(usize)) -> Vec<u32> {
    let mut session = backend.open_with(Arc::new(NoWeights), residency).expect("a session");
    chain(&mut *session, &sides(), after)
}

#[test]
fn graphs_come_and_go_while_a_gpu_works() {
    let expected = on(&Cpu::new(), &Residency::default(), |_| ());
    if let Err(error) = probe::require(None) {
        println!("skipped: {error}");
        return;
    }
    let gpu = Cuda::open(None).expect("the GPU that was found");
    let plans = sides().into_iter().map(|side| gpu.plan(&graph(side), &Residency::default()));
    let (arena, own) = plans.fold((0, 0), |(arena, own), plan| {
        (arena.max(plan.arena_bytes()), own.max(plan.own_bytes()))
    });
    let planned = Residency::default().with_arena(arena).with_own(own);
    for residency in [Residency::default(), planned] {
        let free = gpu.free_memory();
        let mut least = free;
        let found = on(&gpu, &residency, |_| least = least.min(gpu.free_memory()));
        assert!(found == expected, "{residency:?}");
        // Two graphs, the arena, and what the driver rounds up; all graphs would take far more.
        let taken = free.zip(least).map(|(free, least)| free.saturating_sub(least));
        let most = 2 * own + arena + (48 << 20);
        assert!(taken.is_none_or(|taken| taken <= most), "{taken:?} bytes, at most {most}");
    }
    let fenced = on(&gpu.fenced(), &Residency::default(), |_| ());
    assert!(fenced == expected, "fenced");
}
