//! What an op costs: arithmetic, and bytes that any implementation must move.

use super::{Epilogue, Graph, Node, Op, Segment, TensorId, WeightId, shape};

impl Op {
    /// Floating-point operations of the matrix products (a multiply-add counts as two);
    /// element-wise work is bound by memory and counts as zero.
    pub fn flops(&self, graph: &Graph, node: &Node) -> u64 {
        let output = graph.tensor(node.output);
        match self {
            Op::Linear { .. } => {
                let x = graph.tensor(node.inputs[0]);
                2 * x.rows() as u64 * x.cols() as u64 * output.cols() as u64
            }
            Op::Attention(spec) => {
                let pairs: u64 = spec.segments.iter().map(Segment::pairs).sum();
                4 * pairs * output.cols() as u64
            }
            Op::Conv3d(conv) => {
                let weight = &graph.weights()[conv.weight.index()].shape;
                // Of one frame of the kernel.
                let [out, channels, _, height, width] = weight[..] else { return 0 };
                let out = if conv.half().is_some() { out / 2 } else { out };
                let products = (out * channels * height * width) as u64;
                let x = graph.tensor(node.inputs[0]);
                2 * products * shape::conv_frame_positions(conv, &x.shape) as u64
            }
            _ => 0,
        }
    }

    /// Bytes that the op must read and write: inputs, weights and output once each, or twice
    /// what it updates.
    pub fn bytes(&self, graph: &Graph, node: &Node) -> u64 {
        let size = |id: TensorId| {
            let t = graph.tensor(id);
            (t.len() * t.dtype.bytes()) as u64
        };
        let written = size(node.output) * if self.updates_output() { 2 } else { 1 };
        let read: u64 = match self {
            // The tensor is listed as input and as output.
            Op::AddPositionTable { .. } => 0,
            _ => node.inputs.iter().map(|&id| size(id)).sum(),
        };
        written + read + 2 * self.weights_read(graph, node) as u64
    }

    /// Elements of weights that the op reads.
    fn weights_read(&self, graph: &Graph, node: &Node) -> usize {
        let elements =
            |id: WeightId| -> usize { graph.weights()[id.index()].shape.iter().product() };
        match self {
            Op::Linear { parts, epilogue } => {
                let norms = match epilogue {
                    Epilogue::NormHeads(norms) => norms.weights.iter().flatten().copied().collect(),
                    _ => Vec::new(),
                };
                let of_parts = parts.iter().map(|(w, b)| elements(*w) + b.map_or(0, elements));
                of_parts.chain(norms.into_iter().map(elements)).sum()
            }
            // The rows that are looked up.
            Op::Embedding { positions, .. } => {
                graph.tensor(node.output).len() * (1 + usize::from(positions.is_some()))
            }
            Op::AddPositionTable { stage, .. } => {
                stage[0] * stage[1] * graph.tensor(node.output).cols()
            }
            Op::Conv3d(spec) => {
                let all = elements(spec.weight) + elements(spec.bias);
                if spec.half().is_some() { all / 2 } else { all }
            }
            Op::LayerNorm { weight, bias, .. } | Op::GroupNorm { weight, bias, .. } => {
                elements(*weight) + elements(*bias)
            }
            Op::RmsNorm { weight, .. } | Op::HeadNormRope { weight, .. } => elements(*weight),
            Op::Attention(spec) => spec.relative_bias.map_or(0, |b| elements(b.table)),
            Op::LayerNormModulate { .. }
            | Op::Activate(_)
            | Op::GatedGelu
            | Op::TimestepEmbedding
            | Op::Patchify { .. }
            | Op::Unpatchify
            | Op::GuidedEuler
            | Op::NormalNoise { .. }
            | Op::HalveBilinear { .. }
            | Op::DoubleRenoise { .. } => 0,
        }
    }
}
