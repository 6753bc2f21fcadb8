//! Matrix products, and which of them go to cuBLASLt.

use super::hopper::{self, Tile};
use super::{Prepare, int, norm};
use crate::exec::cuda::cublaslt::{CublasLt, Fused, Product};
use crate::exec::cuda::kernels::blocks;
use crate::exec::cuda::params::{self, RowGroups};
use crate::exec::cuda::session::Place;
use crate::exec::cuda::step::{Parameters, Work};
use crate::exec::cuda::tensor_map;
use crate::exec::cuda::weights::{bias_key, is_gated, linear_key};
use crate::exec::cuda::{Cuda, Gemm};
use crate::graph::{Activation, Epilogue, Graph, HeadNorms, Node, Op, WeightId};
use crate::tensor::DType;
use crate::{Error, Result};

/// Most products of one launch, as `kernels/gemm_sm90.cu` has it.
pub(super) const TOGETHER: usize = 2;

/// From so many rows on our kernels for sm_90 are about as fast as cuBLASLt on an H200; below, its
/// split inner dimensions serve it better. docs/performance.md has the rates.
const OWN_ROWS: usize = 1024;

/// Which linear layers go to cuBLASLt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::exec::cuda) enum Takes {
    /// Those of few rows that can run beside no other: a launch of several is faster than the
    /// library is at each.
    FewRowsAlone,
    /// All that it can do.
    Everything,
}

impl Takes {
    fn includes(self, rows: usize, alone: bool) -> bool {
        self == Takes::Everything || (alone && rows < OWN_ROWS)
    }
}

/// cuBLASLt, if linear layers of a session go to it.
pub(in crate::exec::cuda) fn library(backend: &Cuda) -> Result<Option<CublasLt>> {
    let library = |takes| CublasLt::new(&backend.context, takes);
    match backend.gemm {
        Gemm::Own | Gemm::Tile(_) => Ok(None),
        // Nothing is lost but time where it is not installed, or not made for this driver.
        Gemm::Automatic if backend.kernels.hopper => Ok(library(Takes::FewRowsAlone).ok()),
        Gemm::Automatic => Ok(library(Takes::Everything).ok()),
        Gemm::CublasLt => library(Takes::Everything).map(Some),
    }
}

/// What the library fuses for this layer, if that is all there is to do.
fn fused(parts: &[(WeightId, Option<WeightId>)], epilogue: &Epilogue, out: DType) -> Option<Fused> {
    let (gelu, accumulate) = match epilogue {
        // Norms of heads follow by themselves.
        Epilogue::Store | Epilogue::NormHeads(_) => (false, false),
        Epilogue::Activate(Activation::GeluTanh) => (true, false),
        Epilogue::Accumulate => (false, true),
        Epilogue::Activate(_) | Epilogue::GatedAccumulate { .. } => return None,
    };
    // The library takes biases in the type of the output, and ours are bf16.
    let bare = !gelu && parts.iter().all(|(_, bias)| bias.is_none());
    (out == DType::Bf16 || bare).then_some(Fused { gelu, accumulate })
}

/// Bytes of scratch memory that `node` may need in the library.
pub(super) fn scratch_bytes(graph: &Graph, node: &Node) -> usize {
    match &node.op {
        Op::Linear { parts, epilogue }
            if fused(parts, epilogue, graph.tensor(node.output).dtype).is_some() =>
        {
            CublasLt::WORKSPACE
        }
        _ => 0,
    }
}

pub(super) fn linear(
    p: &mut Prepare<'_>,
    parts: &[(WeightId, Option<WeightId>)],
    epilogue: &Epilogue,
) -> Result<()> {
    let x = p.input(0, DType::Bf16)?;
    let dtype = p.graph.tensor(p.node.output).dtype;
    let out = p.output(dtype)?;
    let bias = bias_key(p.graph, parts);
    if bias.is_none() && parts.iter().any(|(_, b)| b.is_some()) {
        return Err(Error::device("weights side by side must all have a bias or none"));
    }
    let mut gemm = params::Gemm {
        x: x.address,
        weight: p.weight(&linear_key(p.graph, parts))?,
        bias: bias.map_or(Ok(0), |key| p.weight(&key))?,
        out: out.address,
        gate: 0,
        ldx: x.stride as i64,
        ldw: x.cols as i64,
        ldo: out.stride as i64,
        ld_gate: 0,
        m: int(x.rows)?,
        n: int(out.cols)?,
        k: int(x.cols)?,
        epilogue: 0,
        activation: 0,
        out_f32: i32::from(dtype == DType::F32),
        groups: bytemuck::Zeroable::zeroed(),
        pad: 0,
    };
    match epilogue {
        Epilogue::Store | Epilogue::NormHeads(_) => {}
        Epilogue::Activate(activation) => gemm.activation = params::activation_code(*activation),
        Epilogue::Accumulate => gemm.epilogue = 1,
        Epilogue::GatedAccumulate { gate_column, groups } => {
            let modulation = p.input(1, DType::F32)?;
            gemm.epilogue = 2;
            gemm.gate = modulation.address + 4 * *gate_column as u64;
            gemm.ld_gate = modulation.stride as i64;
            gemm.groups = row_groups(groups)?;
        }
    }
    debug_assert_eq!(is_gated(epilogue), gemm.gate != 0);
    if !x.cols.is_multiple_of(8) || !x.stride.is_multiple_of(8) || !x.address.is_multiple_of(16) {
        return Err(Error::device(format!(
            "a matrix product over {} columns, {} apart, is not aligned to 16 bytes",
            x.cols, x.stride
        )));
    }
    let alone = p.graph.group(p.index).len() == 1;
    let library = p.cublaslt.filter(|library| library.takes.includes(x.rows, alone));
    if let (Some(library), Some(fused)) = (library, fused(parts, epilogue, dtype)) {
        let params::Gemm { weight, bias, .. } = gemm;
        // Where the library has no algorithm, as for odd alignments, a kernel takes over.
        if let Some(matmul) =
            library.prepare(&Product { x, weight, bias, out, fused }, p.scratch)?
        {
            p.push(Work::Matmul(matmul));
            return norm_heads(p, parts, epilogue);
        }
    }
    let mut layer = Layer { gemm, x, out, heads: bytemuck::Zeroable::zeroed() };
    match epilogue {
        Epilogue::NormHeads(norms) if p.kernels.hopper && fits_hopper(&layer) => {
            match fused_heads(p, parts, norms, out)? {
                Some(heads) => layer.heads = heads,
                None => norm_heads(p, parts, epilogue)?,
            }
        }
        _ => norm_heads(p, parts, epilogue)?,
    }
    p.waiting.layers.push(layer);
    Ok(())
}

/// The norms of heads as `kernels/gemm_sm90.cu` takes them, if it does.
fn fused_heads(
    p: &Prepare<'_>,
    parts: &[(WeightId, Option<WeightId>)],
    norms: &HeadNorms,
    out: Place,
) -> Result<Option<params::Heads>> {
    let table = p.input(1, DType::F32)?;
    let columns = |&(weight, _): &(WeightId, _)| p.graph.weights()[weight.index()].shape[0];
    let part_columns = columns(&parts[0]);
    let alike = parts.len() <= params::Heads::PARTS
        && parts.iter().all(|part| columns(part) == part_columns)
        && part_columns.is_multiple_of(params::Heads::SIZE);
    let aligned = table.address.is_multiple_of(8) && table.stride.is_multiple_of(2);
    let fits = out.dtype == DType::Bf16 && table.cols == params::Heads::SIZE;
    if !fits || !alike || !aligned {
        return Ok(None);
    }
    let mut weights = [0; params::Heads::PARTS];
    for (place, norm) in weights.iter_mut().zip(&norms.weights) {
        if let Some(norm) = *norm {
            *place = norm::vector(p, norm)?;
        }
    }
    Ok(Some(params::Heads {
        weights,
        table: table.address,
        ld_table: table.stride as i64,
        part_columns: int(part_columns)?,
        eps: norms.eps,
    }))
}

/// Lets the norms of heads, if the layer has any, wait for launches of their own behind it.
fn norm_heads(
    p: &mut Prepare<'_>,
    parts: &[(WeightId, Option<WeightId>)],
    epilogue: &Epilogue,
) -> Result<()> {
    let Epilogue::NormHeads(HeadNorms { weights, eps }) = epilogue else { return Ok(()) };
    let table = p.input(1, DType::F32)?;
    let out = p.output(DType::Bf16)?;
    let mut address = out.address;
    for ((weight, _), norm) in parts.iter().zip(weights) {
        let cols = p.graph.weights()[weight.index()].shape[0];
        if let Some(norm) = *norm {
            norm::norm_heads(p, Place { address, cols, ..out }, table, norm, *eps)?;
        }
        address += (cols * out.dtype.bytes()) as u64;
    }
    Ok(())
}

/// A linear layer for one of our kernels.
pub(in crate::exec::cuda) struct Layer {
    gemm: params::Gemm,
    x: Place,
    out: Place,
    heads: params::Heads,
}

/// Appends launches of all, one for all of them where kernels take several.
pub(super) fn launch(p: &mut Prepare<'_>, layers: &[Layer]) -> Result<()> {
    let f32_out = |layer: &Layer| layer.gemm.out_f32 != 0;
    let alike = layers.windows(2).all(|pair| f32_out(&pair[0]) == f32_out(&pair[1]));
    if p.kernels.hopper && alike && layers.iter().all(fits_hopper) {
        return launch_hopper(p, layers, layers.iter().any(f32_out));
    }
    if p.kernels.hopper && layers.len() > 1 {
        return layers.chunks(1).try_for_each(|layer| launch(p, layer));
    }
    let multiprocessors = p.kernels.multiprocessors as usize;
    for Layer { gemm, x, out, .. } in layers {
        let (name, rows, columns) = generic_tile(x.rows, out.cols, multiprocessors);
        let tiles = x.rows.div_ceil(rows) * out.cols.div_ceil(columns);
        p.launch(name, [blocks(tiles, 1)?, 1, 1], gemm)?;
    }
    Ok(())
}

fn launch_hopper(p: &mut Prepare<'_>, layers: &[Layer], f32_out: bool) -> Result<()> {
    let tiles = if f32_out { &HOPPER_TILES_F32[..] } else { &HOPPER_TILES };
    let units = |t: &Tile, Layer { x, out, .. }: &Layer| t.units(x.rows, out.cols, x.cols);
    let all = |t: &Tile| layers.iter().map(|layer| units(t, layer)).collect::<Vec<_>>();
    let multiprocessors = p.kernels.multiprocessors as usize;
    let tiles = match p.tile.map(|forced| forced.among(tiles)) {
        Some(forced) if forced.iter().any(|t| t.fits(multiprocessors, &all(t))) => forced,
        _ => tiles,
    };
    let (tile, grid) = hopper::cheapest(tiles.iter(), multiprocessors, all)?;
    let problem = |layer: &Layer| {
        let &Layer { gemm, x, out, heads } = layer;
        let (rows, cols) = (out.cols, x.cols);
        let weight = Place { address: gemm.weight, rows, cols, stride: cols, dtype: DType::Bf16 };
        let parameters = params::GemmSm90 {
            a: tensor_map::matrix(x, tile.height(x.rows))?,
            b: tensor_map::matrix(weight, tile.columns / tile.cluster)?,
            c: if f32_out { bytemuck::Zeroable::zeroed() } else { tensor_map::matrix(out, 16)? },
            gemm,
            heads,
            tile_rows: int(tile.height(x.rows))?,
            pad: 0,
            tail: [0; 4],
        };
        Ok((parameters, int(units(tile, layer).count())?))
    };
    let problems = layers.iter().map(problem).collect::<Result<Vec<_>>>()?;
    let parameters = Parameters::group::<_, TOGETHER>(&problems);
    let heads = layers.iter().any(|layer| layer.heads.table != 0);
    let suffix = if heads { "_heads" } else { "" };
    p.launch_with(&format!("{}{suffix}", kernel_of(tile, f32_out)), grid, parameters)
}

/// The name of the kernel of a tile, for products without norms of heads.
pub(super) fn kernel_of(tile: &Tile, f32_out: bool) -> String {
    format!("gemm_sm90_{tile}{}", if f32_out { "_f32" } else { "" })
}

/// A tile of one block, or for a cluster of 2 of each, that its consumers share.
const fn shared(rows: usize, columns: usize, [start, step, end]: [usize; 3]) -> Tile {
    Tile { rows, columns, cluster: 1, split: 1, in_turn: false, start, step, end }
}

/// A tile that its block's consumers take in turn.
const fn in_turn(rows: usize, columns: usize, cluster: usize, times: [usize; 3]) -> Tile {
    Tile { cluster, in_turn: true, ..shared(rows, columns, times) }
}

/// A tile that so many blocks share along the inner dimension.
const fn split(rows: usize, columns: usize, split: usize, times: [usize; 3]) -> Tile {
    Tile { split, ..shared(rows, columns, times) }
}

/// The tiles of `kernels/gemm_sm90.cu` for bf16 and for f32. The times are a least-squares fit to
/// what each took for every product of `cargo bench --bench ops linear` on an H200, relative errors
/// counted; they are for choosing among these, and mean little by themselves. The fit is repeated
/// by `cargo bench --bench ops -- linear --tile all --json FILE` and `tools/fit_tiles.py FILE`.
/// Of products with results in f32 the bench has too few.
pub(super) const HOPPER_TILES: [Tile; 7] = [
    in_turn(128, 128, 2, [7300, 363, 3600]),
    shared(128, 192, [7300, 508, 2400]),
    in_turn(64, 192, 2, [7200, 302, 3600]),
    in_turn(64, 64, 1, [6400, 171, 2400]),
    shared(128, 64, [5800, 282, 1000]),
    split(128, 64, 2, [8370, 249, 0]),
    split(128, 64, 4, [9250, 319, 0]),
];
pub(super) const HOPPER_TILES_F32: [Tile; 2] =
    [shared(128, 128, [7300, 333, 2300]), shared(128, 64, [5800, 282, 1000])];

/// Whether the kernels for sm_90 take this layer.
fn fits_hopper(Layer { gemm, out, .. }: &Layer) -> bool {
    gemm.n % 8 == 0
        && out.stride.is_multiple_of(8)
        && out.address.is_multiple_of(32)
        && gemm.gate.is_multiple_of(16)
        && gemm.ld_gate % 4 == 0
}

/// The tile of `kernels/gemm.cu` for a product of `m` rows and `n` columns.
fn generic_tile(m: usize, n: usize, multiprocessors: usize) -> (&'static str, usize, usize) {
    let fills = |rows, columns| m.div_ceil(rows) * n.div_ceil(columns) >= multiprocessors;
    match () {
        () if m <= 16 => ("gemm_16x64", 16, 64),
        () if n <= 16 => ("gemm_128x16", 128, 16),
        () if n <= 32 => ("gemm_128x32", 128, 32),
        () if fills(512, 128) => ("gemm_256x128", 256, 128),
        () if fills(128, 128) => ("gemm_128x128", 128, 128),
        () if fills(128, 64) => ("gemm_128x64", 128, 64),
        () => ("gemm_64x64", 64, 64),
    }
}

/// The groups as kernels take them.
pub(super) fn row_groups(groups: &[crate::graph::RowGroup]) -> Result<RowGroups> {
    RowGroups::new(groups).ok_or_else(|| {
        Error::device(format!("rows change their sample more than {} times", RowGroups::MOST))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::RowGroup;

    /// The tile for products of so many rows, columns and inner dimensions.
    fn tile(products: &[(usize, usize, usize)]) -> String {
        let units = |t: &Tile| products.iter().map(|&(m, n, k)| t.units(m, n, k)).collect();
        hopper::cheapest(HOPPER_TILES.iter(), 132, units).expect("a tile").0.to_string()
    }

    /// What is by far the fastest in the table of every tile and every product that the times are
    /// fitted to.
    #[test]
    fn products_get_the_tiles_that_suit_them() {
        for (products, expected) in [
            (&[(20000, 4608, 1536)][..], "128x128_pair"),
            (&[(2000, 1920, 7680)], "128x128_pair"),
            (&[(2000, 1536, 6144)], "128x192"),
            (&[(97, 4608, 1536), (1850, 4608, 1536)], "128x192"),
            (&[(128, 12288, 4096)], "64x192_pair"),
            (&[(97, 1536, 4096)], "128x64_split4"),
            (&[(128, 4096, 10240)], "128x64_split2"),
            (&[(40, 1920, 4096)], "128x64_split4"),
            (&[(140, 1536, 4096)], "128x64_split2"),
            (&[(256, 1920, 4096)], "128x64_split2"),
            (&[(480, 1536, 1536)], "128x64"),
        ] {
            assert_eq!(tile(products), expected, "{products:?}");
        }
    }

    #[test]
    fn tiles_of_few_rows_are_as_low_as_they_can_be() {
        let find = |name: &str| HOPPER_TILES.into_iter().find(|t| t.to_string() == name);
        for (name, rows, expected) in [
            ("64x64", 1, 16),
            ("64x64", 64, 64),
            ("64x64", 65, 48),
            ("64x64", 140, 48),
            ("64x64", 20_000, 64),
            ("128x64", 97, 112),
            ("128x64_split4", 130, 80),
            ("64x192_pair", 20, 16),
            ("64x192_pair", 128, 64),
            ("128x192", 480, 128),
            ("128x128_pair", 1, 16),
            ("128x128_pair", 300, 80),
        ] {
            let tile = find(name).expect("a tile");
            let height = tile.height(rows);
            assert_eq!(height, expected, "{rows} rows in {name}");
            let tiles = tile.units(rows, 1, 1).down * tile.cluster;
            assert!(height <= tile.rows && tiles * height >= rows, "{rows} rows in {name}");
        }
        // Every tile but the last of a pair has a row.
        for tile in HOPPER_TILES.into_iter().chain(HOPPER_TILES_F32) {
            for rows in 1..700 {
                let tiles = tile.units(rows, 1, 1).down;
                let high = tile.height(rows) * tile.cluster;
                assert!((tiles - 1) * high < rows && rows <= tiles * high, "{rows} rows in {tile}");
            }
        }
    }

    #[test]
    fn the_library_gets_what_it_fuses() {
        use Activation::*;
        let mut graph = Graph::default();
        let (weight, bias) = (graph.weight("w", &[8, 8]), graph.weight("b", &[8]));
        let groups = [RowGroup { rows: 1, sample: 0 }].into();
        let yes = |gelu, accumulate| Some(Fused { gelu, accumulate });
        for (epilogue, bf16, bare_f32) in [
            (Epilogue::Store, yes(false, false), yes(false, false)),
            (Epilogue::Accumulate, yes(false, true), yes(false, true)),
            (Epilogue::Activate(GeluTanh), yes(true, false), None),
            (Epilogue::Activate(Silu), None, None),
            (Epilogue::Activate(GeluErf), None, None),
            (Epilogue::Activate(QuickGelu), None, None),
            (Epilogue::GatedAccumulate { gate_column: 0, groups }, None, None),
        ] {
            let of = |bias, out| fused(&[(weight, None), (weight, bias)], &epilogue, out);
            assert_eq!(of(None, DType::Bf16), bf16, "{epilogue:?}");
            assert_eq!(of(Some(bias), DType::Bf16), bf16, "{epilogue:?}");
            assert_eq!(of(None, DType::F32), bare_f32, "{epilogue:?}");
            assert_eq!(of(Some(bias), DType::F32), None, "{epilogue:?}");
        }
    }
}
