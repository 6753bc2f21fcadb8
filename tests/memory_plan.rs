//! Properties of memory plans, on random graphs and on the real models.

use std::ops::Range;
use std::sync::Arc;

use proptest::prelude::*;
use pyraflow::checkpoint::{Family, Variant};
use pyraflow::exec::{Backend, CONTEXT_BYTES, Cpu, ImaginedGpu, PROCESS_BYTES, lockable};
use pyraflow::graph::{
    Activation, Ahead, Epilogue, Graph, Home, Op, Plan, Residency, Role, Staged, StagedWhat,
    TensorId, matrices,
};
use pyraflow::models::dit::{Clip, Geometry, StepOutput};
use pyraflow::models::vae::{Window, record_decoder};
use pyraflow::pipeline::{Machine, Networks, PhasePlan, Request, Tiling, plan, record_step};
use pyraflow::tensor::{DType, WeightSource, WeightView};
use pyraflow::{Error, Result};

/// Columns of every tensor in the random graphs.
const COLUMNS: usize = 6;

/// One weight, `[COLUMNS, COLUMNS]`, and one bias.
struct Weights(Vec<u8>);

impl WeightSource for Weights {
    fn weight(&self, name: &str) -> Result<WeightView<'_>> {
        let shape: &[usize] = match name {
            "weight" => &[COLUMNS, COLUMNS],
            "norm" => &[COLUMNS],
            _ => return Err(Error::model(name)),
        };
        let bytes = &self.0[..4 * shape.iter().product::<usize>()];
        Ok(WeightView { dtype: DType::F32, shape, bytes })
    }
}

fn weights() -> Arc<Weights> {
    let values = (0..COLUMNS * COLUMNS).map(|i| ((i * 7 % 11) as f32 - 5.0) / 9.0);
    Arc::new(Weights(values.flat_map(f32::to_le_bytes).collect()))
}

/// What to record next: an op, which earlier tensors it uses (counted modulo how many there
/// are) and which rows of the first.
#[derive(Debug, Clone)]
struct Choice {
    op: u8,
    first: usize,
    second: usize,
    half: bool,
}

fn choices() -> impl Strategy<Value = Vec<Choice>> {
    let one = (0u8..5, any::<usize>(), any::<usize>(), any::<bool>());
    let one = one.prop_map(|(op, first, second, half)| Choice { op, first, second, half });
    prop::collection::vec(one, 1..40)
}

/// Records the choices; every few tensors are outputs.
fn record(rows: usize, choices: &[Choice]) -> (Graph, Vec<String>) {
    let mut g = Graph::new();
    let weight = g.weight("weight", &[COLUMNS, COLUMNS]);
    let norm = g.weight("norm", &[COLUMNS]);
    let mut tensors = vec![g.input("input", &[rows, COLUMNS], DType::F32)];
    let mut outputs = Vec::new();
    for (i, choice) in choices.iter().enumerate() {
        let whole = tensors[choice.first % tensors.len()];
        let count = g.tensor(whole).rows();
        let x = if choice.half && count > 1 { g.rows(whole, count / 2..count) } else { whole };
        let count = g.tensor(x).rows();
        let store = |epilogue| Op::Linear { parts: vec![(weight, None)], epilogue };
        let fresh = match choice.op {
            0 => Some(g.push(Op::Activate(Activation::Silu), &[x])),
            1 => Some(g.push(Op::RmsNorm { weight: norm, eps: 1e-6 }, &[x])),
            2 => Some(g.push(store(Epilogue::Store), &[x])),
            _ => None,
        };
        match fresh {
            Some(fresh) => tensors.push(fresh.expect("shapes fit")),
            None => {
                // Update another tensor in place, if one has the rows for it; never the
                // input, which must be the same in every run.
                let other = tensors[choice.second % tensors.len()];
                let fits = other != tensors[0] && g.tensor(other).rows() >= count;
                if fits && g.tensor(other).root != g.tensor(x).root {
                    let place = g.rows(other, 0..count);
                    g.push_into(store(Epilogue::Accumulate), &[x], place).expect("shapes fit");
                }
            }
        }
        if i % 5 == 4 {
            let name = format!("output{i}");
            let tensor = tensors[tensors.len() - 1];
            if tensor != tensors[0] {
                g.mark_output(&name, tensor);
                outputs.push(name);
            }
        }
    }
    (g, outputs)
}

/// Runs the graph and returns all outputs' bits.
fn run(backend: Cpu, g: &Graph, outputs: &[String], input: &[f32]) -> Vec<Vec<u32>> {
    let mut session = backend.open(weights()).expect("session");
    let graph = session.add(g.clone()).expect("plan");
    let id = session.find(graph, "input").expect("input");
    session.write(graph, id, input).expect("write");
    session.run(graph).expect("run");
    let read = |name: &String| {
        let id = session.find(graph, name).expect("output");
        session.read(graph, id).expect("read").iter().map(|v| v.to_bits()).collect()
    };
    outputs.iter().map(read).collect()
}

/// Whether the memory of two placements may overlap although both are alive at one node:
/// only there, and only if it is where one takes the other's place.
fn hands_over(g: &Graph, from: TensorId, to: TensorId, node: usize) -> bool {
    let node = &g.nodes()[node];
    node.op.may_reuse_input()
        && node.output == to
        && node.inputs.first().is_some_and(|&i| g.tensor(i).root == from)
}

/// Inputs and constants, and nothing else, lie in one piece without gaps but for alignment.
fn check_own(g: &Graph, plan: &Plan, storage: impl Fn(DType) -> usize) {
    let mut end = 0;
    for (i, tensor) in g.tensors().iter().enumerate().filter(|(i, t)| t.root.index() == *i) {
        let own = matches!(tensor.role, Role::Input | Role::Constant(_));
        let offset = plan.own_offset(tensor.root);
        assert_eq!(offset.is_some(), own, "tensor {i}, {}", tensor.name);
        if let Some(offset) = offset {
            assert!(
                offset % Plan::ALIGNMENT == 0 && (end..end + Plan::ALIGNMENT).contains(&offset)
            );
            end = offset + (tensor.len() * storage(tensor.dtype)) as u64;
        }
    }
    assert_eq!(plan.own_bytes(), end);
}

fn check_no_overlap(g: &Graph, plan: &Plan) {
    let lifetimes = plan.lifetimes();
    for (i, a) in lifetimes.iter().enumerate() {
        assert_eq!(a.offset % Plan::ALIGNMENT, 0);
        assert!(a.offset + a.bytes <= plan.arena_bytes());
        for b in &lifetimes[i + 1..] {
            let (first, second) = if a.nodes.start <= b.nodes.start { (a, b) } else { (b, a) };
            let together = second.nodes.start < first.nodes.end;
            let apart = a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset;
            if together && !apart {
                let at = second.nodes.start;
                assert!(
                    first.nodes.end == at + 1 && hands_over(g, first.root, second.root, at),
                    "{first:?} and {second:?} overlap"
                );
            }
        }
    }
}

/// Checks what comes in from the host against everything that is alive at the same time.
fn check_stages(g: &Graph, plan: &Plan) {
    let stages = plan.stages();
    let apart = |a: &Staged, offset: u64, bytes: u64| {
        a.offset + a.bytes <= offset || offset + bytes <= a.offset
    };
    let together = |a: &Range<usize>, b: &Range<usize>| a.start < b.end && b.start < a.end;
    for (i, a) in stages.iter().enumerate() {
        assert!(a.nodes.contains(&a.node) && a.offset + a.bytes <= plan.arena_bytes(), "{a:?}");
        for l in plan.lifetimes().iter().filter(|l| together(&l.nodes, &a.nodes)) {
            assert!(apart(a, l.offset, l.bytes), "{a:?} and {l:?} overlap");
        }
        for b in stages[i + 1..].iter().filter(|b| together(&b.nodes, &a.nodes)) {
            assert!(apart(a, b.offset, b.bytes), "{a:?} and {b:?} overlap");
        }
        if matches!(a.what, StagedWhat::State(_)) && !g.moves_on(a.node) {
            assert_eq!(a.nodes.end, a.node + 1, "{a:?} is kept though it need not go out");
        }
        let name = |s: &Staged| match s.what {
            StagedWhat::State(id) => Some(g.tensor(id).name.clone()),
            StagedWhat::Weights => None,
        };
        if let Some(before) = stages[..i].iter().rfind(|b| name(a).is_some() && name(b) == name(a))
        {
            assert!(a.nodes.start > before.node, "{a:?} comes in before {before:?} was used");
        }
    }
}

/// The largest sum of what is alive at one node: no plan without hand-overs can be smaller.
fn largest_live_set(plan: &Plan, nodes: usize) -> u64 {
    let alive = |n| plan.lifetimes().iter().filter(move |l| l.nodes.contains(&n));
    (0..nodes).map(|n| alive(n).map(|l| l.bytes).sum()).max().unwrap_or(0)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn plans_of_random_graphs(rows in 1usize..40, choices in choices()) {
        let (g, outputs) = record(rows, &choices);
        let plan = Cpu::new().plan(&g, &Residency::default());
        check_no_overlap(&g, &plan);
        check_own(&g, &plan, |_| size_of::<f32>());
        let apart = Cpu::new().unshared().plan(&g, &Residency::default());
        // Each placement is padded to the alignment, the last one excepted.
        let padded = apart.arena_bytes().next_multiple_of(Plan::ALIGNMENT);
        prop_assert!(plan.arena_bytes() <= padded);
        prop_assert_eq!(plan.total_bytes(), apart.total_bytes());

        let input: Vec<f32> = (0..rows * COLUMNS).map(|i| (i % 13) as f32 / 6.0 - 1.0).collect();
        let expected = run(Cpu::new().unshared(), &g, &outputs, &input);
        prop_assert_eq!(&run(Cpu::new(), &g, &outputs, &input), &expected);
        prop_assert_eq!(&run(Cpu::new().poisoning(), &g, &outputs, &input), &expected);
    }
}

/// The largest graphs of a 5-second video at 768p.
fn real_graphs(family: Family) -> Vec<Graph> {
    let networks = Networks::published(family);
    let clip =
        |frames, halvings: u32| Clip { frames, height: 96 >> halvings, width: 160 >> halvings };
    let geometry = Geometry {
        text_tokens: vec![128, 128],
        history: vec![clip(13, 2), clip(1, 1), clip(1, 0)],
        current: clip(1, 0),
        separate_latents: false,
    };
    let step = record_step(&networks.transformer, &geometry, StepOutput::EulerStep, DType::Bf16);
    let window = Window { continues: true, carries: true, ..Window::whole(1, 96, 160) };
    let decoder = record_decoder(&networks.vae, window, DType::Bf16);
    vec![step.expect("graph"), decoder.expect("graph")]
}

#[test]
fn plans_of_the_real_models_with_nothing_that_stays() {
    let mut graphs = real_graphs(Family::Sd3);
    let vae = Networks::published(Family::Sd3).vae;
    for at_once in [2, 1] {
        let window =
            Window { continues: true, carries: true, at_once, ..Window::whole(1, 96, 160) };
        graphs.push(record_decoder(&vae, window, DType::Bf16).expect("graph"));
    }
    for g in graphs {
        let mut arena = u64::MAX;
        for near in [Ahead { bytes: 256 << 20, nodes: 4 }, Ahead { bytes: 0, nodes: 1 }] {
            let plan = Plan::staged(&g, DType::bytes, &Residency::nothing_stays(Home::Host, near));
            check_stages(&g, &plan);
            for Staged { node, nodes, .. } in plan.stages() {
                let last = g.group(*node).end.max(node + near.nodes);
                assert!(nodes.start + near.nodes >= *node && nodes.end <= last);
            }
        }
        for ahead in [1 << 40, 512 << 20, 64 << 20, 0] {
            let residency = Residency::nothing_stays(Home::Host, Ahead::bytes(ahead));
            let plan = Plan::staged(&g, DType::bytes, &residency);
            let in_file = Residency::nothing_stays(Home::File, Ahead::bytes(ahead));
            let filed = Plan::staged(&g, DType::bytes, &in_file);
            assert_eq!(filed.stages(), plan.stages(), "the device does not mind where they wait");
            check_stages(&g, &plan);
            let used = g.nodes().iter().filter(|n| n.state.is_some() || !matrices(n).is_empty());
            assert_eq!(plan.stages().len(), used.count());
            // Waiting at one node: what may, and the one that is needed, however large.
            let most = plan.stages().iter().map(|s| s.bytes).max().unwrap_or(0).max(ahead);
            for node in 0..g.nodes().len() {
                let waiting =
                    plan.stages().iter().filter(|s| (s.nodes.start..=s.node).contains(&node));
                assert!(waiting.map(|s| s.bytes).sum::<u64>() <= most);
            }
            assert!(plan.arena_bytes() <= arena, "less ahead takes no more memory");
            arena = plan.arena_bytes();
        }
    }
}

#[test]
fn plans_of_the_real_models() {
    for family in [Family::Sd3, Family::Miniflux] {
        for g in real_graphs(family) {
            let plan = Plan::new(&g, DType::bytes);
            check_no_overlap(&g, &plan);
            check_own(&g, &plan, DType::bytes);
            let share = plan.arena_bytes() as f64 / plan.total_bytes() as f64;
            let floor = largest_live_set(&plan, g.nodes().len()) as f64 / plan.arena_bytes() as f64;
            println!(
                "{family}: {:.1} of {:.1} MiB, {:.1} % of the sum, live set {:.0} % of the peak",
                plan.arena_bytes() as f64 / 1048576.0,
                plan.total_bytes() as f64 / 1048576.0,
                100.0 * share,
                100.0 * floor
            );
            assert!(share < 1.0 / 3.0, "{family}: the peak is {share} of the sum");
            assert!(floor > 0.9, "{family}: more than a tenth of the arena is fragmentation");
        }
    }
}

/// What may run at one time has memory of its own: of no two such nodes does one write where the
/// other reads or writes.
#[test]
fn nodes_side_by_side_share_no_memory() {
    for family in [Family::Sd3, Family::Miniflux] {
        let graphs = real_graphs(family);
        let (g, plan) = (&graphs[0], Plan::new(&graphs[0], DType::bytes));
        let mut pairs = 0;
        for (i, node) in g.nodes().iter().enumerate() {
            let Some(written) = plan.lifetime(g.tensor(node.output).root) else { continue };
            for j in g.group(i).filter(|&j| j != i) {
                pairs += 1;
                let other = &g.nodes()[j];
                for &id in other.inputs.iter().chain([&other.output]) {
                    let Some(used) = plan.lifetime(g.tensor(id).root) else { continue };
                    let apart = written.offset + written.bytes <= used.offset
                        || used.offset + used.bytes <= written.offset;
                    assert!(apart || written.root == used.root, "{}: {i} and {j}", node.label);
                }
            }
        }
        assert!(pairs > 200, "{family}: only {pairs} pairs of nodes may run at one time");
    }
}

#[test]
fn what_depends_on_the_other_does_not_run_beside_it() {
    let record = |first: Range<usize>, second: Range<usize>| {
        let mut g = Graph::new();
        let x = g.input("x", &[8, COLUMNS], DType::F32);
        let [a, b] = [first, second].map(|rows| g.rows(x, rows));
        for (from, to) in [(a, a), (b, b)] {
            g.push_into(Op::Activate(Activation::Silu), &[from], to).expect("fits");
        }
        g.side_by_side(2).map(|()| (g.group(0), g.group(1)))
    };
    assert_eq!(record(0..4, 4..8).expect("apart"), (0..2, 0..2));
    let error = record(0..5, 4..8).expect_err("one row is of both");
    assert!(error.to_string().contains("activate"), "{error}");
}

#[test]
fn published_videos_fit_the_limits_that_are_documented() {
    const GIB: u64 = 1 << 30;
    for family in [Family::Sd3, Family::Miniflux] {
        let networks = Networks::published(family);
        let request = Request::published(family, Variant::P768, "a clip", None);
        let phases = |limit: u64| {
            let gpu = ImaginedGpu { memory: limit - CONTEXT_BYTES, host: None };
            plan(&networks, &request, &gpu, None).expect("a plan")
        };
        // What is locked on the host, at most: carried frames of the decoder above all.
        for (gib, pinned) in [(12, 0.1), (8, 3.5), (6, 6.1), (4, 8.4)] {
            let limit = gib * GIB;
            for phase in phases(limit) {
                let needs = phase.device_bytes + CONTEXT_BYTES;
                assert!(needs <= limit, "{family}, {}: {needs} bytes in {gib} GiB", phase.name);
                let host = phase.pinned_bytes as f64 / GIB as f64;
                assert!(host <= pinned, "{family}, {}, {gib} GiB: {host} GiB pinned", phase.name);
            }
        }
        let smallest = phases(CONTEXT_BYTES).iter().map(|p| p.device_bytes).max().unwrap_or(0);
        assert!(smallest + CONTEXT_BYTES <= 4 * GIB, "{family}: {smallest} bytes at least");
    }
}

#[test]
fn tiles_take_less_of_both_memories() {
    const GIB: u64 = 1 << 30;
    let networks = Networks::published(Family::Sd3);
    let mut request = Request::published(Family::Sd3, Variant::P768, "a clip", None);
    let gpu = ImaginedGpu { memory: 3 * GIB, host: None };
    let decoding = |request: &Request| -> PhasePlan {
        let phases = plan(&networks, request, &gpu, None).expect("a plan");
        phases.into_iter().find(|phase| phase.name == "decoding").expect("decoding")
    };
    let whole = decoding(&request);
    request.tiling = Some(Tiling::PUBLISHED);
    let tiled = decoding(&request);
    assert!(whole.device_bytes > 3 * GIB, "the whole frame does not fit");
    assert!(tiled.device_bytes <= 3 * GIB, "{} bytes in tiles", tiled.device_bytes);
    assert!(tiled.pinned_bytes < whole.pinned_bytes / 4);
    // Tiles overlap.
    assert!(tiled.flops > whole.flops && tiled.flops < 2 * whole.flops);
}

/// The decoding of a 5-second video at 768p within so much memory of GPU and host.
fn decoding(gpu: u64, host: Option<u64>, disk: f64) -> PhasePlan {
    let networks = Networks::published(Family::Sd3);
    let request = Request::published(Family::Sd3, Variant::P768, "a clip", None);
    let gpu = ImaginedGpu { memory: gpu - CONTEXT_BYTES, host };
    let machine = Machine { flops: 60e12, memory: 400e9, link: 25e9, disk };
    let phases = plan(&networks, &request, &gpu, Some(&machine)).expect("a plan");
    phases.into_iter().find(|phase| phase.name == "decoding").expect("decoding")
}

#[test]
fn what_the_host_has_no_memory_for_is_in_the_file() {
    const GIB: u64 = 1 << 30;
    for gpu in [4 * GIB, 5 * GIB, 6 * GIB, 8 * GIB, 12 * GIB] {
        let free = decoding(gpu, None, 2e9);
        assert_eq!(free.scratch_bytes, 0);
        // What is locked without a limit is enough with one that allows just that.
        assert_eq!(decoding(gpu, Some(free.pinned_bytes), 2e9), free);
        for host in [2 * GIB, 4 * GIB] {
            let phase = decoding(gpu, Some(lockable(host)), 2e9);
            assert!(phase.device_bytes + CONTEXT_BYTES <= gpu);
            let takes = PROCESS_BYTES + phase.pinned_bytes;
            assert!(takes <= host, "{takes} bytes in {host}");
            if phase.scratch_bytes == 0 {
                assert!(free.pinned_bytes <= lockable(host));
                continue;
            }
            // Everything is somewhere, and no faster for it.
            assert!(phase.pinned_bytes + phase.scratch_bytes >= free.pinned_bytes);
            let seconds = |phase: &PhasePlan| phase.predicted.expect("a time").seconds;
            assert!(seconds(&phase) >= seconds(&free));
            assert!(seconds(&decoding(gpu, Some(lockable(host)), 1e9)) > seconds(&phase));
        }
    }
    let none = decoding(4 * GIB, Some(0), 2e9);
    assert!(none.pinned_bytes <= 128 << 20, "{} bytes of rings", none.pinned_bytes);
    assert!(none.scratch_bytes > 8 * GIB);
}
