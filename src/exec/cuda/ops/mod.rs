//! From nodes to launches, one file per family of kernels.

pub(super) mod attention;
mod conv;
mod group;
mod hopper;
mod latent;
pub(super) mod linear;
mod linear_tile;
mod norm;
mod pointwise;

use bytemuck::Pod;

use super::cublaslt::CublasLt;
use super::driver::Address;
use super::kernels::Kernels;
use super::session::Place;
use super::step::{Parameters, Step, Work};
use super::tables::Tables;
use super::weights::{DeviceWeights, Key};
use crate::graph::{Graph, Node, Op, TensorId};
use crate::tensor::DType;
use crate::{Error, Result};
pub(super) use group::Waiting;
pub use linear_tile::LinearTile;

/// Bytes of scratch memory that the largest node of `graph` needs, with cuBLASLt or without.
pub(super) fn scratch_bytes(graph: &Graph, kernels: &Kernels, cublaslt: bool) -> usize {
    let of = |node| match cublaslt {
        true => norm::scratch_bytes(graph, node, kernels).max(linear::scratch_bytes(graph, node)),
        false => norm::scratch_bytes(graph, node, kernels),
    };
    graph.nodes().iter().map(of).max().unwrap_or(0)
}

/// One node about to be turned into steps.
pub(super) struct Prepare<'a> {
    pub graph: &'a Graph,
    pub node: &'a Node,
    pub index: usize,
    pub kernels: &'a Kernels,
    /// Where linear layers go to it.
    pub cublaslt: Option<&'a CublasLt>,
    /// The one tile of linear layers on Hopper, where it is not to be chosen for each.
    pub tile: Option<LinearTile>,
    pub weights: &'a DeviceWeights,
    /// The matrices that come in for the node, and where to.
    pub streamed: Option<(Key, Address)>,
    pub tables: &'a Tables,
    pub scratch: Address,
    pub place: &'a dyn Fn(TensorId) -> Result<Place>,
    pub steps: &'a mut Vec<Step>,
    /// What of the nodes before may become one launch with what this one needs.
    pub waiting: &'a mut Waiting,
    /// Whether nothing waits for the node after this one.
    pub last_of_group: bool,
}

impl Prepare<'_> {
    /// Appends the steps of the node, or lets them wait for those of the next.
    pub fn node(&mut self) -> Result<()> {
        self.steps_of_node()?;
        if self.last_of_group { self.launch_waiting() } else { Ok(()) }
    }

    fn steps_of_node(&mut self) -> Result<()> {
        match &self.node.op {
            Op::Embedding { table, positions } => pointwise::embedding(self, *table, *positions),
            Op::Linear { parts, epilogue } => linear::linear(self, parts, epilogue),
            Op::Attention(spec) => attention::attention(self, spec),
            Op::LayerNorm { weight, bias, eps } => norm::layer_norm(self, *weight, *bias, *eps),
            Op::LayerNormModulate { eps, shift_column, scale_column, groups } => {
                norm::layer_norm_modulate(self, *eps, [*shift_column, *scale_column], groups)
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
            &Op::NormalNoise { block, .. } => latent::normal_noise(self, block),
            Op::HalveBilinear { factor } => latent::halve_bilinear(self, *factor),
            Op::DoubleRenoise { alpha, beta } => latent::double_renoise(self, *alpha, *beta),
            Op::Conv3d(spec) => conv::conv3d(self, spec),
        }
    }

    /// Input `i`, which must be of type `dtype`.
    fn input(&self, i: usize, dtype: DType) -> Result<Place> {
        self.typed(self.node.inputs[i], dtype)
    }

    /// The output, which must be of type `dtype`.
    fn output(&self, dtype: DType) -> Result<Place> {
        self.typed(self.node.output, dtype)
    }

    fn typed(&self, id: TensorId, dtype: DType) -> Result<Place> {
        let place = (self.place)(id)?;
        if place.dtype == dtype {
            return Ok(place);
        }
        let name = &self.graph.tensor(id).name;
        Err(Error::device(format!("the kernel takes {name} as {dtype}, it is {}", place.dtype)))
    }

    fn input_shape(&self, i: usize) -> &[usize] {
        &self.graph.tensor(self.node.inputs[i]).shape
    }

    fn output_shape(&self) -> &[usize] {
        &self.graph.tensor(self.node.output).shape
    }

    fn weight(&self, key: &Key) -> Result<Address> {
        let streamed = self.streamed.as_ref().filter(|(streamed, _)| streamed == key);
        let found = streamed.map(|(_, place)| *place).or_else(|| self.weights.address(key));
        found.ok_or_else(|| Error::device(format!("weights were not loaded: {key:?}")))
    }

    /// Appends a launch of the kernel `name`.
    fn launch<T: Pod>(&mut self, name: &str, grid: [u32; 3], parameters: &T) -> Result<()> {
        self.launch_with(name, grid, Parameters::new(parameters))
    }

    fn launch_with(&mut self, name: &str, grid: [u32; 3], parameters: Parameters) -> Result<()> {
        let kernel = self.kernels.get(name)?;
        self.push(Work::Launch { kernel, grid, parameters });
        Ok(())
    }

    fn push(&mut self, work: Work) {
        self.steps.push(Step { node: self.index, work });
    }
}

/// Whether all rows of all places can be read and written in pieces of 8 elements.
fn in_eights(places: &[Place]) -> bool {
    places.iter().all(|p| {
        let aligned = p.address.is_multiple_of(8 * p.dtype.bytes() as u64);
        aligned && p.cols.is_multiple_of(8) && p.stride.is_multiple_of(8)
    })
}

/// A row or element count as kernels take it.
fn int(value: usize) -> Result<i32> {
    i32::try_from(value)
        .map_err(|_| Error::device(format!("{value} is more than a kernel can count")))
}
