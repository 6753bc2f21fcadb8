//! Weights in device memory, in the form that the kernels read.
//!
//! Published weights become bf16, except tables that are only added in f32. Convolution
//! weights are laid out tap by tap; the matrices that one node multiplies with side by side
//! lie one below the other, so that they are one matrix.

use std::collections::HashMap;
use std::sync::Arc;

use super::driver::{Address, Context, DeviceMemory};
use super::kernels::Kernels;
use super::params::PackConv;
use super::upload::Uploader;
use crate::Result;
use crate::graph::{ConvSpec, Epilogue, Graph, Node, Op, Plan, Residency, WeightId};
use crate::tensor::{DType, WeightSource, WeightView};

/// The form in which a kernel reads weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Form {
    /// As in the file, in bf16.
    Bf16,
    /// As in the file, in f32.
    F32,
    /// A convolution's: `[out][tap][in]` in bf16, input channels padded to a multiple of 8.
    Packed(Rows),
    /// As in the file, in bf16, some of the values.
    Bf16Of(Rows),
}

/// Every `every`th row from `first` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Rows {
    first: usize,
    every: usize,
}

impl Rows {
    /// Those of the output channels that a convolution computes.
    fn of(spec: &ConvSpec) -> Rows {
        match spec.half() {
            None => Rows { first: 0, every: 1 },
            Some(first) => Rows { first, every: 2 },
        }
    }
}

/// Weights that lie one after another in one form.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    names: Vec<String>,
    form: Form,
}

impl Key {
    pub fn new(graph: &Graph, weights: &[WeightId], form: Form) -> Key {
        let name = |w: &WeightId| graph.weights()[w.index()].name.clone();
        Key { names: weights.iter().map(name).collect(), form }
    }
}

/// Input channels as convolution kernels read them: whole 16-byte pieces.
pub(super) fn padded_channels(channels: usize) -> usize {
    channels.next_multiple_of(8)
}

/// The weights that `node` reads from device memory.
pub(super) fn keys_of(graph: &Graph, node: &Node) -> Vec<Key> {
    let vectors = |ids: &[WeightId]| ids.iter().map(|&w| vector_key(graph, w)).collect();
    match &node.op {
        Op::Embedding { table, positions } => {
            vectors(&[Some(*table), *positions].into_iter().flatten().collect::<Vec<_>>())
        }
        Op::Linear { parts, epilogue } => {
            let mut keys = vec![linear_key(graph, parts)];
            keys.extend(bias_key(graph, parts));
            if let Epilogue::NormHeads(norms) = epilogue {
                keys.extend(norms.weights.iter().flatten().map(|&norm| vector_key(graph, norm)));
            }
            keys
        }
        Op::LayerNorm { weight, bias, .. } | Op::GroupNorm { weight, bias, .. } => {
            vectors(&[*weight, *bias])
        }
        Op::RmsNorm { weight, .. } | Op::HeadNormRope { weight, .. } => vectors(&[*weight]),
        Op::AddPositionTable { table, .. } => vec![Key::new(graph, &[*table], Form::F32)],
        Op::Conv3d(spec) => vec![conv_key(graph, spec), conv_bias_key(graph, spec)],
        // The relative bias is expanded on the host into a table of the graph.
        Op::Attention(_)
        | Op::LayerNormModulate { .. }
        | Op::Activate(_)
        | Op::GatedGelu
        | Op::TimestepEmbedding
        | Op::Patchify { .. }
        | Op::Unpatchify
        | Op::GuidedEuler
        | Op::NormalNoise { .. }
        | Op::HalveBilinear { .. }
        | Op::DoubleRenoise { .. } => Vec::new(),
    }
}

/// A norm's weight or bias.
pub(super) fn vector_key(graph: &Graph, weight: WeightId) -> Key {
    Key::new(graph, &[weight], Form::Bf16)
}

/// The matrices of a linear node, one below the other.
pub(super) fn linear_key(graph: &Graph, parts: &[(WeightId, Option<WeightId>)]) -> Key {
    Key::new(graph, &parts.iter().map(|(w, _)| *w).collect::<Vec<_>>(), Form::Bf16)
}

/// The biases of a linear node, one after the other, if it has them.
pub(super) fn bias_key(graph: &Graph, parts: &[(WeightId, Option<WeightId>)]) -> Option<Key> {
    let biases: Option<Vec<WeightId>> = parts.iter().map(|(_, b)| *b).collect();
    biases.map(|b| Key::new(graph, &b, Form::Bf16))
}

/// The weight of a convolution.
pub(super) fn conv_key(graph: &Graph, spec: &ConvSpec) -> Key {
    Key::new(graph, &[spec.weight], Form::Packed(Rows::of(spec)))
}

/// The bias of a convolution.
pub(super) fn conv_bias_key(graph: &Graph, spec: &ConvSpec) -> Key {
    let form = spec.half().map_or(Form::Bf16, |_| Form::Bf16Of(Rows::of(spec)));
    Key::new(graph, &[spec.bias], form)
}

/// Whether a node's epilogue reads the modulation table.
pub(super) fn is_gated(epilogue: &Epilogue) -> bool {
    matches!(epilogue, Epilogue::GatedAccumulate { .. })
}

/// All weights of a session that are on the device.
pub(super) struct DeviceWeights {
    source: Arc<dyn WeightSource>,
    places: HashMap<Key, Address>,
    memory: Vec<DeviceMemory>,
}

impl DeviceWeights {
    pub fn new(source: Arc<dyn WeightSource>) -> DeviceWeights {
        DeviceWeights { source, places: HashMap::new(), memory: Vec::new() }
    }

    /// All weights on the host.
    pub fn source(&self) -> &dyn WeightSource {
        &*self.source
    }

    /// The weight called `name`, on the host.
    pub fn host(&self, name: &str) -> Result<WeightView<'_>> {
        self.source.weight(name)
    }

    /// Where the weights of `key` lie, once they were [loaded](Self::load).
    pub fn address(&self, key: &Key) -> Option<Address> {
        self.places.get(key).copied()
    }

    /// Brings what `graph` needs, is to stay there and is not there yet to the device, in one
    /// allocation.
    pub fn load(
        &mut self,
        graph: &Graph,
        residency: &Residency,
        context: &Arc<Context>,
        kernels: &Kernels,
        uploader: &mut Uploader,
    ) -> Result<()> {
        let mut offset = 0u64;
        let mut wanted: Vec<(Key, u64)> = Vec::new();
        let mut seen = HashMap::new();
        let mut staging = 0;
        let staying = |node| {
            let streamed = residency.streamed(graph, node);
            let streamed = Key::new(graph, &streamed, Form::Bf16);
            keys_of(graph, node).into_iter().filter(move |key| *key != streamed)
        };
        for key in graph.nodes().iter().flat_map(staying) {
            if self.places.contains_key(&key) || seen.contains_key(&key) {
                continue;
            }
            let bytes = self.bytes_of(&key)?;
            if let Form::Packed(rows) = key.form {
                staging = staging.max(bytes * rows.every as u64);
            }
            seen.insert(key.clone(), ());
            wanted.push((key, offset));
            offset = (offset + bytes).next_multiple_of(Plan::ALIGNMENT);
        }
        if wanted.is_empty() {
            return Ok(());
        }
        let memory = DeviceMemory::new(context, offset as usize, "weights")?;
        let staging = DeviceMemory::new(context, staging as usize, "weights on their way")?;
        for (key, offset) in wanted {
            let place = memory.address() + offset;
            self.upload(&key, place, kernels, uploader, &staging)?;
            self.places.insert(key, place);
        }
        // Before the staging memory goes.
        uploader.finish()?;
        self.memory.push(memory);
        Ok(())
    }

    fn bytes_of(&self, key: &Key) -> Result<u64> {
        let mut elements = 0;
        for name in &key.names {
            let view = self.source.weight(name)?;
            elements += match key.form {
                Form::Packed(rows) => {
                    view.len() / view.shape[1] * padded_channels(view.shape[1]) / rows.every
                }
                Form::Bf16Of(rows) => view.len() / rows.every,
                Form::Bf16 | Form::F32 => view.len(),
            };
        }
        let size = if key.form == Form::F32 { 4 } else { 2 };
        Ok(elements as u64 * size)
    }

    fn upload(
        &self,
        key: &Key,
        mut to: Address,
        kernels: &Kernels,
        uploader: &mut Uploader,
        staging: &DeviceMemory,
    ) -> Result<()> {
        for name in &key.names {
            let view = self.source.weight(name)?;
            match key.form {
                Form::Bf16 => to += uploader.upload(&view, DType::Bf16, to)?,
                Form::F32 => to += uploader.upload(&view, DType::F32, to)?,
                Form::Bf16Of(rows) => {
                    let values = view.to_f32().into_iter().skip(rows.first).step_by(rows.every);
                    let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
                    let shape = [view.len() / rows.every];
                    let some = WeightView { dtype: DType::F32, shape: &shape, bytes: &bytes };
                    to += uploader.upload(&some, DType::Bf16, to)?;
                }
                Form::Packed(rows) => {
                    uploader.upload(&view, DType::Bf16, staging.address())?;
                    let taps: usize = view.shape[2..].iter().product();
                    let [cout, cin] = [view.shape[0] / rows.every, view.shape[1]];
                    let parameters = PackConv {
                        weight: staging.address(),
                        out: to,
                        cout: cout as i32,
                        cin: cin as i32,
                        taps: taps as i32,
                        cin_padded: padded_channels(cin) as i32,
                        first: rows.first as i32,
                        every: rows.every as i32,
                    };
                    let elements = cout * taps * padded_channels(cin);
                    uploader.launch(kernels.pack_conv(elements, &parameters)?)?;
                    to += 2 * elements as u64;
                }
            }
        }
        Ok(())
    }
}
