//! Graphs on the device: running them.

mod graphs;
mod placing;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use half::bf16;
use rayon::prelude::*;

use super::Cuda;
use super::cublaslt::CublasLt;
use super::driver::{Address, Context, DeviceMemory, Event, Recorded, Stream};
use super::kernels::Kernels;
use super::memory::{PATTERN, Piece, Spare};
use super::ops::{self, LinearTile};
use super::readback::Readback;
use super::step::{Step, Work};
use super::tables::Tables;
use super::traffic::{Schedule, Traffic};
use super::upload::Uploader;
use super::weights::DeviceWeights;
use crate::exec::{GraphId, Pending, Session, check_copy};
use crate::graph::{Graph, Op, Plan, Residency, Role, TensorId};
use crate::tensor::{DType, WeightSource};
use crate::{Error, Result};

/// Bytes written between timed runs, so that the next finds no data in the cache: several
/// times the 60 MB of the largest.
const FLUSH: usize = 256 << 20;

/// How many runs may be queued that have not ended: enough to keep the device busy while the host
/// makes the next graph, and few enough that what is reported as done is nearly done, and that
/// who wants to stop need not wait long.
const RUNS_AHEAD: usize = 8;

/// Where a tensor lies in device memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Place {
    pub address: Address,
    pub rows: usize,
    pub cols: usize,
    /// Elements between rows.
    pub stride: usize,
    pub dtype: DType,
}

/// A graph with everything that runs need.
struct Planned {
    graph: Graph,
    plan: Plan,
    /// Memory of inputs and constants, and of all roots in a fenced session.
    own: HashMap<TensorId, Piece>,
    /// What those pieces lie in, outside of fenced sessions.
    memory: Option<DeviceMemory>,
    tables: Tables,
    schedule: Schedule,
    steps: Vec<Step>,
    /// The arena and scratch memory that `steps` were made for.
    made_for: [Address; 2],
    /// Whether nothing is queued yet that uses its inputs.
    fresh: bool,
    /// Whether the graph has run.
    ran: bool,
    /// All steps as one, once the graph has run before.
    recorded: Option<Recorded>,
}

/// A removed graph that queued work may still use.
struct Retired {
    planned: Planned,
    /// Marks what was queued before it was removed. That covers what came in for it on other
    /// streams, which its nodes wait for; what goes out uses memory of the session only.
    done: Event,
}

/// Graphs that share weights, an arena and states on one GPU.
pub(super) struct CudaSession {
    stream: Stream,
    uploader: Arc<Mutex<Uploader>>,
    context: Arc<Context>,
    kernels: Arc<Kernels>,
    /// Where linear layers go to it.
    cublaslt: Option<CublasLt>,
    tile: Option<LinearTile>,
    fenced: bool,
    residency: Residency,
    first_run: Arc<OnceLock<Instant>>,
    traffic: Traffic,
    weights: DeviceWeights,
    graphs: Vec<Option<Planned>>,
    retired: Vec<Retired>,
    /// For inputs and constants, and for attention tables.
    spare: Spare,
    spare_tables: Spare,
    /// Each marks the end of a run, the oldest first.
    runs: VecDeque<Event>,
    arena: Option<DeviceMemory>,
    scratch: Option<DeviceMemory>,
    readback: Readback,
    /// By name and bytes: graphs for tiles of several sizes take turns in one session.
    states: HashMap<(String, usize), Piece>,
}

impl CudaSession {
    /// In a fenced session all tensors have memory of their own, so everything stays there.
    pub fn new(
        backend: &Cuda,
        weights: Arc<dyn WeightSource>,
        residency: &Residency,
    ) -> Result<CudaSession> {
        let residency = if backend.fenced { Residency::default() } else { residency.clone() };
        Ok(CudaSession {
            traffic: Traffic::new(backend)?,
            residency,
            first_run: backend.first_run.clone(),
            stream: Stream::new(&backend.context)?,
            uploader: backend.uploader.clone(),
            context: backend.context.clone(),
            kernels: backend.kernels.clone(),
            cublaslt: ops::linear::library(backend)?,
            tile: backend.gemm.tile(),
            fenced: backend.fenced,
            weights: DeviceWeights::new(weights),
            graphs: Vec::new(),
            retired: Vec::new(),
            spare: Spare::default(),
            spare_tables: Spare::default(),
            runs: VecDeque::new(),
            arena: None,
            scratch: None,
            readback: Readback::default(),
            states: HashMap::new(),
        })
    }

    fn planned(&self, id: GraphId) -> Result<&Planned> {
        planned(&self.graphs, id)
    }

    fn input(&self, graph: GraphId, input: TensorId, elements: usize) -> Result<Place> {
        let planned = self.planned(graph)?;
        let tensor = planned.graph.tensor(input);
        if tensor.root != input || tensor.role != Role::Input {
            return Err(Error::usage("only inputs can be written"));
        }
        assert_eq!(tensor.len(), elements, "elements of the input {}", tensor.name);
        self.place(planned, input)
    }

    /// Writes to an input of `graph`, which has room for the bytes: at once if nothing queued uses
    /// it, else behind what is queued.
    fn put(&self, graph: GraphId, to: Address, bytes: &[u8]) -> Result<()> {
        if self.planned(graph)?.fresh && !self.fenced {
            let mut uploader = self.uploader.lock().unwrap_or_else(PoisonError::into_inner);
            return uploader.bring(bytes, to);
        }
        self.stream.bind()?;
        // SAFETY: the input holds as many bytes. Pageable memory is read before the driver
        // returns: what is small it copies aside without waiting for the stream.
        unsafe { self.stream.upload(to, bytes) }
    }

    /// Notes that something that is queued now uses inputs of `graph`.
    fn uses_inputs(&mut self, graph: GraphId) {
        if let Some(planned) = self.graphs.get_mut(graph.0).and_then(Option::as_mut) {
            planned.fresh = false;
        }
    }

    /// Queues all nodes. `after` is called behind each.
    fn queue_nodes(
        &mut self,
        graph: GraphId,
        mut after: impl FnMut(&Stream) -> Result<()>,
    ) -> Result<()> {
        self.stream.bind()?;
        let arena = self.bases()[0];
        let CudaSession { graphs, traffic, stream, weights, .. } = self;
        let planned = planned(graphs, graph)?;
        let (graph, schedule) = (&planned.graph, &planned.schedule);
        if !schedule.is_empty() {
            traffic.begin(stream)?;
        }
        let mut steps = planned.steps.iter().peekable();
        for node in 0..graph.nodes().len() {
            if !schedule.is_empty() {
                traffic.enter(schedule, node, arena, weights.source(), stream)?;
            }
            while let Some(step) = steps.next_if(|step| step.node == node) {
                // SAFETY: the steps were made for the present arena and scratch memory; all
                // else they name belongs to the session. One stream: steps run in order, and
                // it waits for what other streams bring.
                unsafe { step.queue(stream, graph, false)? };
            }
            if !schedule.is_empty() {
                traffic.leave(schedule, node, arena, stream)?;
            }
            after(stream)?;
        }
        Ok(())
    }

    /// Queues the graph: step by step the first time, as one from the second on, since small
    /// kernels end sooner than the host starts the next. Traffic with the host cannot be
    /// recorded.
    fn queue(&mut self, graph: GraphId) -> Result<()> {
        self.uses_inputs(graph);
        let planned = self.planned(graph)?;
        let again = planned.ran && planned.schedule.is_empty() && !self.fenced;
        if !again {
            self.queue_nodes(graph, |_| Ok(()))?;
        } else {
            if planned.recorded.is_none() {
                let recorded = self.stream.record(|| {
                    let mut before = None;
                    for step in &planned.steps {
                        let early = step.may_start_early(before);
                        // SAFETY: as in `queue_nodes`.
                        unsafe { step.queue(&self.stream, &planned.graph, early)? };
                        before = Some(step);
                    }
                    Ok(())
                })?;
                if let Some(planned) = self.graphs[graph.0].as_mut() {
                    planned.recorded = Some(recorded);
                }
            }
            self.stream.bind()?;
            if let Some(recorded) = &self.planned(graph)?.recorded {
                // SAFETY: as in `queue_nodes`: it was recorded for the present steps.
                unsafe { recorded.queue(&self.stream)? };
            }
        }
        if let Some(planned) = self.graphs[graph.0].as_mut() {
            planned.ran = true;
        }
        self.first_run.get_or_init(Instant::now);
        Ok(())
    }

    /// Waits until nothing is queued or on its way.
    fn settle(&self) -> Result<()> {
        self.stream.synchronize()?;
        self.traffic.settle()
    }

    /// Waits until few enough runs are queued, the last one included.
    fn pace(&mut self) -> Result<()> {
        let oldest = if self.runs.len() < RUNS_AHEAD { None } else { self.runs.pop_front() };
        let end = match oldest {
            Some(event) => {
                event.synchronize()?;
                event
            }
            None => Event::new(&self.context)?,
        };
        end.record(&self.stream)?;
        self.runs.push_back(end);
        Ok(())
    }

    /// Makes the steps of `graph` anew if memory has moved since.
    fn refresh(&mut self, graph: GraphId) -> Result<()> {
        let planned = self.planned(graph)?;
        if planned.made_for != self.bases() {
            let (steps, made_for) = (self.prepare(planned)?, self.bases());
            if let Some(planned) = self.graphs[graph.0].as_mut() {
                (planned.steps, planned.made_for, planned.recorded) = (steps, made_for, None);
            }
        }
        Ok(())
    }

    /// Fills what a run has to write with NaN.
    fn poison(&self, planned: &Planned) -> Result<()> {
        for (&id, piece) in &planned.own {
            if matches!(planned.graph.tensor(id).role, Role::Intermediate | Role::Output) {
                // SAFETY: the piece is of this size, and nothing runs.
                unsafe { self.stream.fill(piece.address(), PATTERN, piece.bytes())? };
            }
        }
        Ok(())
    }

    /// Checks every guard zone that a run of `planned` could have touched.
    fn check_guards(&self, planned: &Planned) -> Result<()> {
        self.stream.synchronize()?;
        let pieces = planned.own.values().chain(self.states.values());
        pieces.into_iter().try_for_each(|piece| piece.check(&self.stream))
    }
}

/// The graph `id` of a session.
fn planned(graphs: &[Option<Planned>], id: GraphId) -> Result<&Planned> {
    let found = graphs.get(id.0).and_then(Option::as_ref);
    found.ok_or_else(|| Error::usage("the graph was removed from its session"))
}

impl Drop for CudaSession {
    /// What is queued uses memory that goes now.
    fn drop(&mut self) {
        let _ = self.settle();
    }
}

impl Session for CudaSession {
    fn add(&mut self, graph: Graph) -> Result<GraphId> {
        for weight in graph.weights() {
            let found = self.weights.host(&weight.name)?;
            if found.shape != weight.shape {
                return Err(Error::model(format!(
                    "{} has shape {:?}, the model needs {:?}",
                    weight.name, found.shape, weight.shape
                )));
            }
        }
        self.reclaim()?;
        let added = self.plan(graph);
        if added.is_err() {
            // Whoever tries again, or something else, has all the room there is.
            self.spare.clear();
            self.spare_tables.clear();
        }
        added
    }

    fn remove(&mut self, graph: GraphId) {
        if let Some(planned) = self.graphs.get_mut(graph.0).and_then(Option::take) {
            self.retire(planned);
        }
    }

    fn find(&self, graph: GraphId, name: &str) -> Result<TensorId> {
        self.planned(graph)?.graph.find(name)
    }

    fn write(&mut self, graph: GraphId, input: TensorId, data: &[f32]) -> Result<()> {
        let place = self.input(graph, input, data.len())?;
        let narrow = |v: &f32| bf16::from_f32(*v);
        match place.dtype {
            DType::Bf16 => {
                let data: Vec<bf16> = data.par_iter().map(narrow).collect();
                self.put(graph, place.address, bytemuck::cast_slice(&data))
            }
            _ => self.put(graph, place.address, bytemuck::cast_slice(data)),
        }
    }

    fn write_ids(&mut self, graph: GraphId, input: TensorId, ids: &[u32]) -> Result<()> {
        let place = self.input(graph, input, ids.len())?;
        // A kernel cannot say which id was wrong.
        let planned = self.planned(graph)?;
        for node in planned.graph.nodes().iter().filter(|n| n.inputs.first() == Some(&input)) {
            if let Op::Embedding { table, .. } = node.op {
                let vocabulary = planned.graph.weights()[table.index()].shape[0];
                crate::exec::check_ids(ids, vocabulary)?;
            }
        }
        self.put(graph, place.address, bytemuck::cast_slice(ids))
    }

    fn copy(
        &mut self,
        from: (GraphId, TensorId),
        first: usize,
        to: (GraphId, TensorId),
    ) -> Result<()> {
        let (source, target) = (self.planned(from.0)?, self.planned(to.0)?);
        let tensors = (source.graph.tensor(from.1), target.graph.tensor(to.1));
        check_copy(tensors.0, first, tensors.1, from.0 == to.0)?;
        let graphs = [from.0, to.0];
        let (from, to) = (self.place(source, from.1)?, self.place(target, to.1)?);
        for graph in graphs {
            self.uses_inputs(graph);
        }
        let row = to.cols * to.dtype.bytes();
        self.stream.bind()?;
        // SAFETY: both tensors have the rows, and an input has memory of its own, which no
        // tensor of another graph lies in.
        unsafe { self.stream.copy(to.address, from.address + (first * row) as u64, to.rows * row) }
    }

    fn run(&mut self, graph: GraphId) -> Result<()> {
        self.refresh(graph)?;
        if !self.fenced {
            self.queue(graph)?;
            return self.pace();
        }
        self.stream.bind()?;
        self.poison(self.planned(graph)?)?;
        self.queue(graph)?;
        self.check_guards(self.planned(graph)?)
    }

    fn read(&mut self, graph: GraphId, tensor: TensorId) -> Result<Vec<f32>> {
        let planned = self.planned(graph)?;
        let place = self.place(planned, tensor)?;
        self.stream.bind()?;
        // Whole rows with the gaps between them: only outputs that are views have any.
        let elements = place.rows.saturating_sub(1) * place.stride + place.cols;
        let mut bytes = vec![0u8; elements * place.dtype.bytes()];
        // SAFETY: the rows lie within the tensor's memory; the stream is waited for.
        unsafe { self.stream.download(&mut bytes, place.address)? };
        self.stream.synchronize()?;
        let mut out = vec![0.0; place.rows * place.cols];
        let size = place.dtype.bytes();
        out.par_chunks_mut(place.cols.max(1)).enumerate().for_each(|(r, row)| {
            let bytes = &bytes[r * place.stride * size..][..place.cols * size];
            match place.dtype {
                DType::Bf16 => {
                    for (v, b) in row.iter_mut().zip(bytes.chunks_exact(2)) {
                        *v = bf16::from_le_bytes([b[0], b[1]]).to_f32();
                    }
                }
                _ => {
                    for (v, b) in row.iter_mut().zip(bytes.chunks_exact(4)) {
                        *v = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                    }
                }
            }
        });
        Ok(out)
    }

    fn fetch_pixels(&mut self, graph: GraphId, tensor: TensorId) -> Result<Pending<Vec<u8>>> {
        let planned = self.planned(graph)?;
        let place = self.place(planned, tensor)?;
        if place.dtype != DType::Bf16 || place.stride != place.cols {
            return Err(Error::device("pixels are fetched from contiguous bf16 tensors"));
        }
        self.stream.bind()?;
        self.readback.pixels(&self.context, &self.kernels, &self.stream, place)
    }

    fn kernels(&self, graph: GraphId) -> Result<Vec<&'static str>> {
        let name = |step: &Step| match &step.work {
            Work::Launch { kernel, .. } => Some(kernel.name),
            Work::Matmul(_) | Work::Copy { .. } | Work::Clear { .. } => None,
        };
        Ok(self.planned(graph)?.steps.iter().filter_map(name).collect())
    }

    fn time(&mut self, graph: GraphId, repeats: usize) -> Result<Vec<f64>> {
        self.refresh(graph)?;
        self.stream.bind()?;
        let flush = DeviceMemory::new(&self.context, FLUSH, "flushing the cache")?;
        self.queue(graph)?;
        let mut events = Vec::new();
        for _ in 0..repeats {
            // SAFETY: the memory lives until all runs have ended below.
            unsafe { self.stream.fill(flush.address(), 0, FLUSH)? };
            let (start, end) = (Event::new(&self.context)?, Event::new(&self.context)?);
            start.record(&self.stream)?;
            self.queue(graph)?;
            end.record(&self.stream)?;
            events.push((start, end));
        }
        self.stream.synchronize()?;
        events.iter().map(|(start, end)| end.seconds_since(start)).collect()
    }

    fn profile(&mut self, graph: GraphId) -> Result<Vec<f64>> {
        self.refresh(graph)?;
        self.queue(graph)?;
        let context = self.context.clone();
        let mark = |stream: &Stream| {
            let event = Event::new(&context)?;
            event.record(stream)?;
            Ok::<_, Error>(event)
        };
        let mut marks = vec![mark(&self.stream)?];
        self.queue_nodes(graph, |stream| {
            marks.push(mark(stream)?);
            Ok(())
        })?;
        self.stream.synchronize()?;
        marks.windows(2).map(|pair| pair[1].seconds_since(&pair[0])).collect()
    }
}
