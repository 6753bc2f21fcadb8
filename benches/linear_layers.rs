//! How near the CPU backend's linear layers come to the machine's f32 matrix-product rate.
//!
//! The ceiling is measured in the same run: every thread multiplies large square matrices
//! that stay in its cache. The layers are those of a block of the real sd3 transformer
//! (width 1536), run through graph, plan and executor with bf16 weights, epilogues included.
//! Each figure is the median of several runs after a warm-up; inputs are random.
//!
//! `cargo bench --bench linear_layers`

use std::sync::Arc;
use std::time::Instant;

use pyraflow::Result;
use pyraflow::exec::{Backend, Cpu, Operand, gemm_into};
use pyraflow::graph::{Activation, Epilogue, Graph, Op, RowGroup};
use pyraflow::sampler::philox;
use pyraflow::tensor::{DType, WeightSource, WeightView};
use rayon::prelude::*;

const WIDTH: usize = 1536;
const REPEATS: usize = 7;

/// Weights of any name: slices of one pool of random bf16 values.
struct RandomWeights {
    shapes: Vec<(String, Vec<usize>)>,
    pool: Vec<u8>,
}

impl WeightSource for RandomWeights {
    fn weight(&self, name: &str) -> Result<WeightView<'_>> {
        let shape = self.shapes.iter().find(|(n, _)| n == name).map(|(_, s)| s.as_slice());
        let shape = shape.ok_or_else(|| pyraflow::Error::model(name))?;
        let bytes = 2 * shape.iter().product::<usize>();
        Ok(WeightView { dtype: DType::Bf16, shape, bytes: &self.pool[..bytes] })
    }
}

/// Values between −1 and 1.
fn random(n: usize) -> Vec<f32> {
    let word = |i: usize| philox::philox4x32([i as u32, (i >> 32) as u32, 0, 0], [1, 2])[0];
    (0..n).map(|i| word(i) as f32 / u32::MAX as f32 * 2.0 - 1.0).collect()
}

/// Median seconds of `run`.
fn median(mut run: impl FnMut()) -> f64 {
    run();
    let mut times: Vec<f64> = (0..REPEATS)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[REPEATS / 2]
}

/// FLOP/s of square products on all threads at once.
fn ceiling() -> f64 {
    const N: usize = 768;
    const PRODUCTS: usize = 8;
    let (a, b) = (random(N * N), random(N * N));
    let tasks = rayon::current_num_threads();
    let seconds = median(|| {
        (0..tasks).into_par_iter().for_each(|_| {
            let mut c = vec![0.0f32; N * N];
            for _ in 0..PRODUCTS {
                let lhs = Operand { start: a.as_ptr(), column: 1, row: N };
                let rhs = Operand { start: b.as_ptr(), column: 1, row: N };
                // SAFETY: all three matrices are `N × N` and do not overlap.
                unsafe { gemm_into([N; 3], c.as_mut_ptr(), N, false, lhs, rhs) };
            }
            std::hint::black_box(&c);
        });
    });
    (2 * N * N * N * PRODUCTS * tasks) as f64 / seconds
}

/// One linear layer: name, rows, inputs, outputs, epilogue.
fn layer(name: &str, rows: usize, inputs: usize, outputs: usize, kind: Kind) -> (f64, u64, String) {
    let mut g = Graph::new();
    let x = g.input("x", &[rows, inputs], DType::F32);
    let weight = g.weight("weight", &[outputs, inputs]);
    let bias = g.weight("bias", &[outputs]);
    let parts = vec![(weight, Some(bias))];
    let groups: Arc<[RowGroup]> = [RowGroup { rows, sample: 0 }].into();
    match kind {
        Kind::Plain => drop(g.push(Op::Linear { parts, epilogue: Epilogue::Store }, &[x])),
        Kind::Gelu => {
            let epilogue = Epilogue::Activate(Activation::GeluTanh);
            drop(g.push(Op::Linear { parts, epilogue }, &[x]));
        }
        Kind::Gated => {
            let gates = g.input("gates", &[1, outputs], DType::F32);
            let y = g.input("y", &[rows, outputs], DType::F32);
            let epilogue = Epilogue::GatedAccumulate { gate_column: 0, groups };
            g.push_into(Op::Linear { parts, epilogue }, &[x, gates], y).expect("shapes");
        }
    }
    let shapes = g.weights().iter().map(|w| (w.name.clone(), w.shape.clone())).collect();
    let pool = random(outputs * inputs)
        .iter()
        .flat_map(|v| half::bf16::from_f32(v * 0.05).to_le_bytes())
        .collect();
    let flops = g.flops();
    let mut session = Cpu::new().open(Arc::new(RandomWeights { shapes, pool })).expect("session");
    let graph = session.add(g).expect("plan");
    let input = session.find(graph, "x").expect("input");
    session.write(graph, input, &random(rows * inputs)).expect("write");
    let seconds = median(|| session.run(graph).expect("run"));
    (seconds, flops, format!("{name} {rows}x{inputs}→{outputs}"))
}

#[derive(Clone, Copy)]
enum Kind {
    Plain,
    Gelu,
    Gated,
}

fn main() {
    let peak = ceiling();
    println!("{} threads, f32 matrix products: {:.1} GFLOP/s", rayon::current_num_threads(), peak / 1e9);
    println!("{:<28}{:>10}{:>12}{:>10}", "layer", "ms", "GFLOP/s", "of peak");
    for rows in [496, 2176] {
        for (name, inputs, outputs, kind) in [
            ("to_q, to_k, to_v", WIDTH, 3 * WIDTH, Kind::Plain),
            ("to_out", WIDTH, WIDTH, Kind::Gated),
            ("ff in", WIDTH, 4 * WIDTH, Kind::Gelu),
            ("ff out", 4 * WIDTH, WIDTH, Kind::Gated),
        ] {
            let (seconds, flops, name) = layer(name, rows, inputs, outputs, kind);
            let rate = flops as f64 / seconds;
            println!(
                "{name:<28}{:>10.2}{:>12.1}{:>9.0}%",
                seconds * 1e3,
                rate / 1e9,
                100.0 * rate / peak
            );
        }
    }
}
