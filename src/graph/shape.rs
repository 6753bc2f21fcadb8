//! Shape inference: what each op produces from its inputs, or why it cannot.

use super::{ConvSpec, Epilogue, Graph, Op, RowGroup, Shuffle, TensorId, WeightId};
use crate::sampler::CHANNELS;
use crate::{Error, Result};

/// Checks the inputs of `op` and returns the shape of its output.
///
/// # Errors
/// [`crate::ErrorKind::Model`] naming the op and the shapes that do not fit.
pub(super) fn infer(graph: &Graph, op: &Op, inputs: &[TensorId]) -> Result<Vec<usize>> {
    let shapes: Vec<&[usize]> = inputs.iter().map(|&t| &graph.tensor(t).shape[..]).collect();
    let check = Checker { graph, op, shapes: &shapes };
    match op {
        Op::Embedding { table, positions } => {
            let [n] = check.fixed::<1>(0)?;
            let d = check.matrix_cols(*table)?;
            if let Some(positions) = positions {
                let shape = check.weight(*positions);
                check.that(shape.len() == 2 && shape[1] == d && shape[0] >= n, "positions")?;
            }
            Ok(vec![n, d])
        }
        Op::Linear { parts, epilogue } => linear(&check, parts, epilogue),
        Op::Attention(spec) => {
            let [queries, d] = check.fixed::<2>(0)?;
            let [keys, dk] = check.fixed::<2>(1)?;
            let [values, dv] = check.fixed::<2>(2)?;
            check.that(d == dk && d == dv && keys == values, "q, k and v")?;
            check.that(spec.heads > 0 && d % spec.heads == 0, "heads")?;
            if let Some(bias) = &spec.relative_bias {
                check.that(check.weight(bias.table) == [bias.buckets, spec.heads], "bias")?;
            }
            for segment in spec.segments.iter() {
                check.that(segment.queries.end <= queries, "query range")?;
                check.that(segment.keys.iter().all(|r| r.end <= keys), "key range")?;
            }
            Ok(vec![queries, d])
        }
        Op::LayerNorm { weight, bias, .. } => {
            let d = check.last(0)?;
            check.that(check.weight(*weight) == [d] && check.weight(*bias) == [d], "weights")?;
            Ok(shapes[0].to_vec())
        }
        Op::RmsNorm { weight, .. } => {
            check.that(check.weight(*weight) == [check.last(0)?], "weight")?;
            Ok(shapes[0].to_vec())
        }
        Op::LayerNormModulate { shift_column, scale_column, groups, .. } => {
            let [n, d] = check.fixed::<2>(0)?;
            check.modulation(1, (*shift_column).max(*scale_column) + d, groups, n)?;
            Ok(vec![n, d])
        }
        Op::HeadNormRope { weight, heads, .. } => {
            // Input 0 is the table; the tensor updated is the output, checked by the caller.
            let [n, size] = check.fixed::<2>(0)?;
            check.that(check.weight(*weight) == [size] && size % 2 == 0, "head size")?;
            Ok(vec![n, heads * size])
        }
        Op::Activate(_) => Ok(shapes[0].to_vec()),
        Op::GatedGelu => {
            let [n, m] = check.fixed::<2>(0)?;
            check.that(m % 2 == 0, "columns")?;
            Ok(vec![n, m / 2])
        }
        // The width is the caller's choice: 256 in every published model.
        Op::TimestepEmbedding => Ok(vec![check.fixed::<1>(0)?[0], 256]),
        Op::Patchify { .. } => {
            let [t, h, w, c] = check.fixed::<4>(0)?;
            check.that(h % 2 == 0 && w % 2 == 0, "even height and width")?;
            Ok(vec![t * (h / 2) * (w / 2), 4 * c])
        }
        // The grid is the caller's choice; the caller's output is checked by element count.
        Op::Unpatchify => {
            let [n, c4] = check.fixed::<2>(0)?;
            check.that(c4 % 4 == 0, "columns")?;
            Ok(vec![n, c4])
        }
        Op::AddPositionTable { table, max_size, stage, grid } => {
            let shape = check.weight(*table);
            check.that(shape.len() == 3 && shape[1] == max_size * max_size, "table")?;
            check.that(stage[0] <= *max_size && stage[1] <= *max_size, "size of the table")?;
            let [n, d] = check.fixed::<2>(0)?;
            check.that(d == shape[2] && n % (grid[0] * grid[1]) == 0, "tokens")?;
            Ok(vec![n, d])
        }
        Op::GuidedEuler => {
            let [b, h, w, c] = check.fixed::<4>(0)?;
            check.that((1..=2).contains(&b) && shapes[1] == [2], "batch and scalars")?;
            Ok(vec![1, h, w, c])
        }
        Op::NormalNoise { frames, height, width, block } => {
            check.that(check.fixed::<1>(0)? == [4], "words")?;
            check.that(!block || height % 2 == 0 && width % 2 == 0, "even height and width")?;
            Ok(vec![*frames, *height, *width, CHANNELS])
        }
        Op::HalveBilinear { .. } => {
            let [t, h, w, c] = check.fixed::<4>(0)?;
            check.that(h % 2 == 0 && w % 2 == 0 && c == CHANNELS, "latents")?;
            Ok(vec![t, h / 2, w / 2, c])
        }
        Op::DoubleRenoise { .. } => {
            let [t, h, w, c] = check.fixed::<4>(0)?;
            let doubled = [t, 2 * h, 2 * w, c];
            check.that(c == CHANNELS && check.fixed::<4>(1)? == doubled, "latents and noise")?;
            Ok(doubled.to_vec())
        }
        Op::Conv3d(spec) => conv3d(&check, spec),
        Op::GroupNorm { weight, bias, groups, .. } => {
            let [_, _, _, c] = check.fixed::<4>(0)?;
            check.that(check.weight(*weight) == [c] && check.weight(*bias) == [c], "weights")?;
            check.that(*groups > 0 && c % groups == 0, "groups")?;
            Ok(shapes[0].to_vec())
        }
    }
}

fn linear(
    check: &Checker<'_>,
    parts: &[(WeightId, Option<WeightId>)],
    epilogue: &Epilogue,
) -> Result<Vec<usize>> {
    let [n, k] = check.fixed::<2>(0)?;
    let mut columns = 0;
    for (weight, bias) in parts {
        let shape = check.weight(*weight);
        let inner: usize = shape.iter().skip(1).product();
        check.that(shape.len() >= 2 && inner == k, "inner dimension")?;
        if let Some(bias) = bias {
            check.that(check.weight(*bias) == [shape[0]], "bias")?;
        }
        columns += shape[0];
    }
    if let Epilogue::GatedAccumulate { gate_column, groups } = epilogue {
        check.modulation(1, gate_column + columns, groups, n)?;
    }
    if let Epilogue::NormHeads(norms) = epilogue {
        let [rows, size] = check.fixed::<2>(1)?;
        check.that(rows == n && size % 2 == 0 && norms.weights.len() == parts.len(), "norms")?;
        for ((weight, _), norm) in parts.iter().zip(&norms.weights) {
            if let Some(norm) = norm {
                let heads = check.weight(*weight)[0].is_multiple_of(size);
                check.that(heads && check.weight(*norm) == [size], "head size")?;
            }
        }
    }
    Ok(vec![n, columns])
}

/// Output extents of a convolution before any shuffle: frames, height, width.
fn conv_extent(spec: &ConvSpec, shape: &[usize]) -> [usize; 3] {
    let [kt, kh, kw] = spec.kernel;
    let [st, sh, sw] = spec.stride;
    let padded = [shape[0] + spec.front_frames(), shape[1] + kh - 1, shape[2] + kw - 1];
    [(padded[0] - kt) / st + 1, (padded[1] - kh) / sh + 1, (padded[2] - kw) / sw + 1]
}

/// Number of pairs of a position at which the kernel is applied and a frame of it, those
/// frames left out that are zeros in front of a video.
pub(super) fn conv_frame_positions(spec: &ConvSpec, shape: &[usize]) -> usize {
    let [frames, height, width] = conv_extent(spec, shape);
    let zeros = if spec.continues { 0 } else { spec.front_frames() };
    let seen = |t: usize| (0..spec.kernel[0]).filter(|k| t * spec.stride[0] + k >= zeros).count();
    height * width * (0..frames).map(seen).sum::<usize>()
}

fn conv3d(check: &Checker<'_>, spec: &ConvSpec) -> Result<Vec<usize>> {
    let x = check.fixed::<4>(0)?;
    let weight = check.weight(spec.weight);
    check.that(weight.len() == 5 && weight[1] == x[3] && weight[2..] == spec.kernel, "weight")?;
    check.that(check.weight(spec.bias) == [weight[0]], "bias")?;
    check.that(x[..3].iter().all(|&n| n > 0), "extent")?;
    let [t, h, w] = conv_extent(spec, &x);
    let c = weight[0];
    let shape = match spec.shuffle {
        Shuffle::None => vec![t, h, w, c],
        Shuffle::Space => {
            check.that(c.is_multiple_of(4), "channels for the shuffle")?;
            vec![t, 2 * h, 2 * w, c / 4]
        }
        Shuffle::Time { drop_first } => {
            check.that(c.is_multiple_of(2), "channels for the shuffle")?;
            vec![2 * t - usize::from(drop_first), h, w, c / 2]
        }
        Shuffle::OneOfTime { .. } => {
            check.that(c.is_multiple_of(2), "channels for the shuffle")?;
            vec![t, h, w, c / 2]
        }
    };
    if spec.residual {
        check.that(check.shapes[1] == shape, "residual")?;
    }
    Ok(shape)
}

struct Checker<'a> {
    graph: &'a Graph,
    op: &'a Op,
    shapes: &'a [&'a [usize]],
}

impl Checker<'_> {
    fn that(&self, holds: bool, what: &str) -> Result<()> {
        if holds {
            return Ok(());
        }
        Err(Error::model(format!(
            "{}: {what} does not fit inputs {:?} with {:?}",
            self.op.name(),
            self.shapes,
            self.op
        )))
    }

    fn fixed<const N: usize>(&self, input: usize) -> Result<[usize; N]> {
        self.that(self.shapes.len() > input, "number of inputs")?;
        self.shapes[input].try_into().map_err(|_| {
            Error::model(format!(
                "{}: input {input} has shape {:?}, expected {N} dimensions",
                self.op.name(),
                self.shapes[input]
            ))
        })
    }

    fn last(&self, input: usize) -> Result<usize> {
        self.that(self.shapes.len() > input && !self.shapes[input].is_empty(), "input")?;
        Ok(self.shapes[input][self.shapes[input].len() - 1])
    }

    fn weight(&self, id: WeightId) -> &[usize] {
        &self.graph.weights()[id.index()].shape
    }

    fn matrix_cols(&self, id: WeightId) -> Result<usize> {
        let shape = self.weight(id);
        self.that(shape.len() == 2, "weight")?;
        Ok(shape[1])
    }

    fn modulation(
        &self,
        input: usize,
        columns: usize,
        groups: &[RowGroup],
        rows: usize,
    ) -> Result<()> {
        let [samples, available] = self.fixed::<2>(input)?;
        self.that(columns <= available, "modulation columns")?;
        self.that(groups.iter().all(|g| g.sample < samples), "modulation rows")?;
        self.that(groups.iter().map(|g| g.rows).sum::<usize>() == rows, "row groups")
    }
}
