//! The CPU backend: plain Rust, f32 maths, simple enough to trust.
//!
//! It is the numerical oracle for every other backend. Tensors are held as f32 whatever
//! their type; those declared bf16 are rounded to bf16 whenever a node writes them, so that
//! the same backend also tells what bf16 storage costs.

mod attention;
mod conv;
mod latent;
mod linear;
mod memory;
mod norm;
mod pointwise;

pub use linear::{Operand, gemm_into};

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use crate::exec::{Backend, GraphId, Pending, Session, check_copy};
use crate::graph::{Graph, Node, Op, Plan, Residency, Role, TensorId, WeightId};
use crate::sampler::LatentShape;
use crate::tensor::{DType, WeightSource, WeightView};
use crate::{Error, Result};
use memory::{Buffer, Mat, MatMut};

/// The CPU backend. Work is spread over rayon's global thread pool.
#[derive(Debug, Clone, Copy)]
pub struct Cpu {
    activations: DType,
    poison: bool,
    share: bool,
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

impl Cpu {
    /// Activations in f32.
    pub fn new() -> Self {
        Cpu { activations: DType::F32, poison: false, share: true }
    }

    /// Activations rounded to bf16 wherever a device would store them so: what bf16 costs.
    pub fn rounding_to_bf16() -> Self {
        Cpu { activations: DType::Bf16, ..Self::new() }
    }

    /// Fills memory with NaN as soon as the plan frees it, so that a use after the end of
    /// a tensor's life shows.
    pub fn poisoning(mut self) -> Self {
        self.poison = true;
        self
    }

    /// Gives every tensor memory of its own: what sharing must not change.
    pub fn unshared(mut self) -> Self {
        self.share = false;
        self
    }
}

/// Memory that processes may still take, in bytes, where the system says so.
pub fn available_memory() -> Option<u64> {
    memory_info("/proc/meminfo", "MemAvailable:")
}

/// All memory of the machine, in bytes, where the system says so.
pub fn total_memory() -> Option<u64> {
    memory_info("/proc/meminfo", "MemTotal:")
}

/// Memory of this process that no file stands behind, in bytes, where the system says so.
pub fn anonymous_memory() -> Option<u64> {
    memory_info("/proc/self/status", "RssAnon:")
}

fn memory_info(file: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Every element takes an f32's place on this backend.
const ELEMENT: usize = size_of::<f32>();

impl Backend for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn description(&self) -> String {
        format!("CPU, {} threads", rayon::current_num_threads())
    }

    fn activations(&self) -> DType {
        self.activations
    }

    fn plan(&self, graph: &Graph, _: &Residency) -> Plan {
        if self.share { Plan::new(graph, |_| ELEMENT) } else { Plan::unshared(graph, |_| ELEMENT) }
    }

    fn free_memory(&self) -> Option<u64> {
        available_memory()
    }

    fn copies_weights(&self) -> bool {
        false
    }

    fn open_with(&self, weights: Arc<dyn WeightSource>, _: &Residency) -> Result<Box<dyn Session>> {
        Ok(Box::new(CpuSession {
            backend: *self,
            weights,
            graphs: Vec::new(),
            arena: Buffer::zeroed(0),
            states: HashMap::new(),
            packed: HashMap::new(),
        }))
    }
}

struct Planned {
    graph: Graph,
    plan: Plan,
    /// Memory of inputs and constants, by root.
    own: HashMap<TensorId, Buffer>,
    /// Roots whose life ends with each node.
    deaths: Vec<Vec<TensorId>>,
}

struct CpuSession {
    backend: Cpu,
    weights: Arc<dyn WeightSource>,
    graphs: Vec<Option<Planned>>,
    arena: Buffer,
    /// By name and length: graphs for tiles of several sizes take turns in one session.
    states: HashMap<(String, usize), Buffer>,
    /// Convolution weights in the order the kernel reads them, by name.
    packed: HashMap<String, Arc<[f32]>>,
}

impl CpuSession {
    fn planned(&self, id: GraphId) -> Result<&Planned> {
        self.graphs
            .get(id.0)
            .and_then(Option::as_ref)
            .ok_or_else(|| Error::usage("the graph was removed from its session"))
    }

    fn input_buffer(&mut self, id: GraphId, input: TensorId) -> Result<&mut [f32]> {
        let planned = self
            .graphs
            .get_mut(id.0)
            .and_then(Option::as_mut)
            .ok_or_else(|| Error::usage("the graph was removed from its session"))?;
        planned
            .own
            .get_mut(&input)
            .map(Buffer::as_mut_slice)
            .ok_or_else(|| Error::usage("only inputs can be written"))
    }
}

impl Session for CpuSession {
    fn add(&mut self, graph: Graph) -> Result<GraphId> {
        for weight in graph.weights() {
            let found = self.weights.weight(&weight.name)?;
            if found.shape != weight.shape {
                return Err(Error::model(format!(
                    "{} has shape {:?}, the model needs {:?}",
                    weight.name, found.shape, weight.shape
                )));
            }
        }
        let plan = self.backend.plan(&graph, &Residency::default());
        let mut own = HashMap::new();
        for (i, tensor) in graph.tensors().iter().enumerate() {
            let id = TensorId(i as u32);
            if tensor.root != id {
                continue;
            }
            match &tensor.role {
                Role::Input => drop(own.insert(id, Buffer::zeroed(tensor.len()))),
                Role::Constant(c) => drop(own.insert(id, Buffer::from(&graph.constants()[*c]))),
                Role::State => {
                    let key = (tensor.name.clone(), tensor.len());
                    self.states.entry(key).or_insert_with(|| Buffer::zeroed(tensor.len()));
                }
                Role::Intermediate | Role::Output => {}
            }
        }
        let mut deaths = vec![Vec::new(); graph.nodes().len()];
        for lifetime in plan.lifetimes() {
            // Outputs outlive the last node.
            if let Some(dying) = deaths.get_mut(lifetime.nodes.end - 1) {
                dying.push(lifetime.root);
            }
        }
        let elements = plan.arena_bytes() as usize / ELEMENT;
        if self.arena.len() < elements {
            self.arena = Buffer::zeroed(elements);
        }
        self.pack_convolutions(&graph)?;
        self.graphs.push(Some(Planned { graph, plan, own, deaths }));
        Ok(GraphId(self.graphs.len() - 1))
    }

    fn remove(&mut self, graph: GraphId) {
        if let Some(slot) = self.graphs.get_mut(graph.0) {
            *slot = None;
        }
    }

    fn find(&self, graph: GraphId, name: &str) -> Result<TensorId> {
        self.planned(graph)?.graph.find(name)
    }

    fn write(&mut self, graph: GraphId, input: TensorId, data: &[f32]) -> Result<()> {
        let dtype = self.planned(graph)?.graph.tensor(input).dtype;
        let buffer = self.input_buffer(graph, input)?;
        buffer.copy_from_slice(data);
        memory::round(dtype, buffer);
        Ok(())
    }

    fn write_ids(&mut self, graph: GraphId, input: TensorId, ids: &[u32]) -> Result<()> {
        let buffer = self.input_buffer(graph, input)?;
        bytemuck::cast_slice_mut::<f32, u32>(buffer).copy_from_slice(ids);
        Ok(())
    }

    fn copy(
        &mut self,
        from: (GraphId, TensorId),
        first: usize,
        to: (GraphId, TensorId),
    ) -> Result<()> {
        let planned = self.planned(from.0)?;
        let (source, target) =
            (planned.graph.tensor(from.1), self.planned(to.0)?.graph.tensor(to.1));
        check_copy(source, first, target, from.0 == to.0)?;
        let rows = first..first + target.rows();
        let place = self.place(planned, from.1)?;
        // An input has memory of its own, which no tensor of another graph lies in.
        let buffer = self.input_buffer(to.0, to.1)?;
        for (row, out) in rows.zip(buffer.chunks_exact_mut(place.cols)) {
            out.copy_from_slice(place.row(row));
        }
        Ok(())
    }

    fn run(&mut self, graph: GraphId) -> Result<()> {
        let planned = self.planned(graph)?;
        (0..planned.graph.nodes().len()).try_for_each(|step| self.node(planned, step))
    }

    fn read(&mut self, graph: GraphId, tensor: TensorId) -> Result<Vec<f32>> {
        let planned = self.planned(graph)?;
        let t = planned.graph.tensor(tensor);
        let mat = self.place(planned, tensor)?;
        let mut out = Vec::with_capacity(t.len());
        for r in 0..mat.rows {
            out.extend_from_slice(mat.row(r));
        }
        Ok(out)
    }

    fn fetch_pixels(&mut self, graph: GraphId, tensor: TensorId) -> Result<Pending<Vec<u8>>> {
        let values = self.read(graph, tensor)?;
        Ok(Box::new(move || pixels(&values)))
    }

    fn time(&mut self, graph: GraphId, repeats: usize) -> Result<Vec<f64>> {
        self.run(graph)?;
        let once = |_| {
            let clock = Instant::now();
            self.run(graph)?;
            Ok(clock.elapsed().as_secs_f64())
        };
        (0..repeats).map(once).collect()
    }

    fn profile(&mut self, graph: GraphId) -> Result<Vec<f64>> {
        self.run(graph)?;
        let planned = self.planned(graph)?;
        let timed = |step| {
            let clock = Instant::now();
            self.node(planned, step)?;
            Ok(clock.elapsed().as_secs_f64())
        };
        (0..planned.graph.nodes().len()).map(timed).collect()
    }
}

impl CpuSession {
    fn node(&self, planned: &Planned, step: usize) -> Result<()> {
        let node = &planned.graph.nodes()[step];
        let run = Run { session: self, planned, node };
        run.execute().map_err(|e| e.at(format!("{} ({})", node.label, node.op.name())))?;
        if self.backend.poison { self.poison(planned, step) } else { Ok(()) }
    }
}

/// See [`Session::fetch_pixels`].
fn pixels(values: &[f32]) -> Result<Vec<u8>> {
    if values.iter().any(|v| !v.is_finite()) {
        return Err(Error::numeric("decoded frames hold NaN or infinity")
            .hint("the VAE's weights may be damaged; the latents are kept"));
    }
    Ok(values.iter().map(|v| (v * 127.5 + 127.5).clamp(0.0, 255.0) as u8).collect())
}

impl CpuSession {
    /// Where a tensor lies.
    fn place(&self, planned: &Planned, id: TensorId) -> Result<Mat> {
        let t = planned.graph.tensor(id);
        let root = planned.graph.tensor(t.root);
        let start = match &root.role {
            Role::Input | Role::Constant(_) => planned.own.get(&t.root).map(Buffer::start),
            Role::State => self.states.get(&(root.name.clone(), root.len())).map(Buffer::start),
            Role::Intermediate | Role::Output => planned
                .plan
                .lifetime(t.root)
                .map(|l| self.arena.start_at(l.offset as usize / ELEMENT)),
        };
        let start = start.ok_or_else(|| {
            Error::usage(format!("tensor {} is read or written by no node", root.name))
        })?;
        Ok(Mat::new(start.offset(t.offset), t.rows(), t.cols(), t.row_stride))
    }

    fn weight(&self, planned: &Planned, id: WeightId) -> Result<WeightView<'_>> {
        self.weights.weight(&planned.graph.weights()[id.index()].name)
    }

    fn pack_convolutions(&mut self, graph: &Graph) -> Result<()> {
        for node in graph.nodes() {
            let Op::Conv3d(spec) = &node.op else { continue };
            let name = &graph.weights()[spec.weight.index()].name;
            if !self.packed.contains_key(name) {
                let packed = conv::pack(&self.weights.weight(name)?);
                self.packed.insert(name.clone(), packed.into());
            }
        }
        Ok(())
    }

    /// Fills what died with node `step` with NaN, unless another tensor took its place.
    fn poison(&self, planned: &Planned, step: usize) -> Result<()> {
        let lifetimes = planned.plan.lifetimes();
        for &root in &planned.deaths[step] {
            let Some(dead) = planned.plan.lifetime(root) else { continue };
            let taken = lifetimes.iter().any(|l| {
                let overlaps =
                    l.offset < dead.offset + dead.bytes && dead.offset < l.offset + l.bytes;
                overlaps && l.nodes.contains(&step) && l.nodes.contains(&(step + 1))
            });
            if !taken {
                let place = self.place(planned, root)?;
                // SAFETY: by the plan nothing alive uses this memory any more, and nodes
                // run one after another.
                let mut place = unsafe { place.writable() };
                place.for_each_row(|_, row| row.fill(f32::NAN));
            }
        }
        Ok(())
    }
}

/// One node about to be executed: finds tensors and weights for the kernels.
struct Run<'a> {
    session: &'a CpuSession,
    planned: &'a Planned,
    node: &'a Node,
}

impl Run<'_> {
    fn input(&self, i: usize) -> Result<Mat> {
        self.session.place(self.planned, self.node.inputs[i])
    }

    fn input_shape(&self, i: usize) -> &[usize] {
        &self.planned.graph.tensor(self.node.inputs[i]).shape
    }

    fn output(&self) -> Result<MatMut> {
        let place = self.session.place(self.planned, self.node.output)?;
        // SAFETY: a plan never gives the output the memory of an input that is still
        // needed, except where the op may read and write the same place (see
        // `Op::may_reuse_input` and `Op::updates_output`), and those kernels read a row
        // before they write it. Nodes run one after another.
        Ok(unsafe { place.writable() })
    }

    fn output_shape(&self) -> &[usize] {
        &self.planned.graph.tensor(self.node.output).shape
    }

    fn output_dtype(&self) -> DType {
        self.planned.graph.tensor(self.node.output).dtype
    }

    fn weight(&self, id: WeightId) -> Result<WeightView<'_>> {
        self.session.weight(self.planned, id)
    }

    fn weight_f32(&self, id: WeightId) -> Result<Vec<f32>> {
        Ok(self.weight(id)?.to_f32())
    }

    fn execute(&self) -> Result<()> {
        match &self.node.op {
            Op::Embedding { table, positions } => pointwise::embedding(self, *table, *positions),
            Op::Linear { parts, epilogue } => linear::linear(self, parts, epilogue),
            Op::Attention(spec) => attention::attention(self, spec),
            Op::LayerNorm { weight, bias, eps } => norm::layer_norm(self, *weight, *bias, *eps),
            Op::LayerNormModulate { eps, shift_column, scale_column, groups } => {
                norm::layer_norm_modulate(self, *eps, *shift_column, *scale_column, groups)
            }
            Op::RmsNorm { weight, eps } => norm::rms_norm(self, *weight, *eps),
            Op::HeadNormRope { weight, eps, heads } => {
                norm::head_norm_rope(self, *weight, *eps, *heads)
            }
            Op::GroupNorm { weight, bias, groups, eps, silu } => {
                norm::group_norm(self, [*weight, *bias], *groups, *eps, *silu)
            }
            Op::Activate(activation) => pointwise::activate(self, *activation),
            Op::GatedGelu => pointwise::gated_gelu(self),
            Op::TimestepEmbedding => pointwise::timestep_embedding(self),
            Op::Patchify { channels_first } => pointwise::patchify(self, *channels_first),
            Op::Unpatchify => pointwise::unpatchify(self),
            Op::AddPositionTable { table, max_size, stage, grid } => {
                pointwise::add_position_table(self, *table, *max_size, *stage, *grid)
            }
            Op::GuidedEuler => pointwise::guided_euler(self),
            &Op::NormalNoise { frames, height, width, block } => {
                latent::normal_noise(self, LatentShape { frames, height, width }, block)
            }
            Op::HalveBilinear { factor } => latent::halve_bilinear(self, *factor),
            Op::DoubleRenoise { alpha, beta } => latent::double_renoise(self, *alpha, *beta),
            Op::Conv3d(spec) => conv::conv3d(self, spec),
        }
    }
}
