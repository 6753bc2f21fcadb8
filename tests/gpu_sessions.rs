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

/// Runs of each graph, which all give the same: fewer than are let wait, so that the next graph is
/// added while they are under way.
const RUNS: usize = 4;

/// How often a run computes `half`, so that it takes longer than adding a graph.
const REPEATS: usize = 50;

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
    let half = g.empty(&[1, side / 2, side / 2, CHANNELS], DType::F32);
    for _ in 0..REPEATS {
        g.push_into(Op::HalveBilinear { factor: 1.0 }, &[rest], half).expect("shapes fit");
    }
    g.mark_output("half", half);
    g
}

fn values(side: usize, seed: usize) -> Vec<f32> {
    let value = |i: usize| ((i * 7919 + seed * 104_729) % 1009) as f32 / 512.0 - 1.0;
    (0..side * side * CHANNELS).map(value).collect()
}

fn write(session: &mut dyn Session, graph: GraphId, name: &str, values: &[f32]) {
    let input = session.find(graph, name).expect("an input");
    session.write(graph, input, values).expect("as many values");
}

/// Runs a graph for each of `sides` from what the one before gave, removes that, and adds the next
/// while the runs are under way. Returns the bits of what is passed on and of a piece of every
/// graph's `half`; `after` sees every round.
fn chain(session: &mut dyn Session, sides: &[usize], mut after: impl FnMut(usize)) -> Vec<u32> {
    let mut held = Graph::new();
    let mut hold = |name: &str| held.input(name, &[1, SIDE, SIDE, CHANNELS], DType::F32);
    let x = hold("x");
    let halves: Vec<_> = (0..sides.len()).map(|round| hold(&format!("half {round}"))).collect();
    let holder = session.add(held).expect("a graph");
    write(session, holder, "x", &values(SIDE, 0));
    // Made before, so that writing them is quick.
    let rests: Vec<_> = (2..).zip(sides).map(|(seed, &side)| values(side, seed)).collect();
    let mut before: Option<GraphId> = None;
    for (round, &side) in sides.iter().enumerate() {
        let added = session.add(graph(side)).expect("a graph");
        write(session, added, "noise", &values(2 * SIDE, round + 1));
        write(session, added, "rest", &rests[round]);
        if let Some(removed) = before.replace(added) {
            session.remove(removed);
            let error = session.run(removed).expect_err("it was removed");
            assert_eq!(error.kind(), ErrorKind::Usage);
            session.remove(removed);
        }
        let [input, y, half] =
            ["x", "y", "half"].map(|name| session.find(added, name).expect("a tensor"));
        session.copy((holder, x), 0, (added, input)).expect("a copy");
        (0..RUNS).for_each(|_| session.run(added).expect("a run"));
        session.copy((added, y), 0, (holder, x)).expect("a copy");
        let last_rows = (side / 2).pow(2) - SIDE * SIDE;
        session.copy((added, half), last_rows, (holder, halves[round])).expect("a copy");
        after(round);
    }
    let held = [x].into_iter().chain(halves);
    held.flat_map(|t| session.read(holder, t).expect("values")).map(f32::to_bits).collect()
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
