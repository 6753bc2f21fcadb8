//! What cases are fed with: values that are a pure function of a seed and a position, so
//! that a case means the same everywhere and large tensors are made on all threads.

use std::collections::HashMap;

use half::bf16;
use rayon::prelude::*;

use crate::graph::Graph;
use crate::tensor::{DType, WeightSource, WeightView};
use crate::{Error, Result};

/// How a tensor is filled.
#[derive(Debug, Clone)]
pub enum Fill {
    /// Normal values of this standard deviation (a sum of four uniform ones).
    Normal(f32),
    /// Uniform values between two bounds.
    Uniform(f32, f32),
    /// One value everywhere.
    Constant(f32),
    /// One value a row, another in each.
    ConstantRows,
    /// Ones where the position in the last dimension equals that in all others, else zeros.
    Identity,
    /// `mean`, and its bf16 neighbour in one of `rarity` elements: a variance so small
    /// beside the mean that it is lost when squares are subtracted.
    NearlyConstant {
        /// The common value.
        mean: f32,
        /// Elements per deviating one.
        rarity: u64,
    },
    /// These values, over and over.
    Values(Vec<f32>),
    /// Ids below a bound; the first is the largest, the second 0.
    Ids(u32),
    /// These words, over and over, in an input of words.
    Words(Vec<u32>),
    /// Another fill but for one element.
    WithNan(Box<Fill>, usize),
}

impl Fill {
    /// This fill with NaN as element `at`.
    pub fn with_nan(self, at: usize) -> Fill {
        Fill::WithNan(Box::new(self), at)
    }

    /// The elements of a tensor of `shape`.
    pub fn values(&self, seed: u64, shape: &[usize]) -> Vec<f32> {
        let mut values = vec![0.0; shape.iter().product()];
        let cols = shape.last().copied().unwrap_or(1).max(1);
        const PIECE: usize = 1 << 14;
        values.par_chunks_mut(PIECE).enumerate().for_each(|(piece, values)| {
            for (i, value) in values.iter_mut().enumerate() {
                *value = self.value(seed, piece * PIECE + i, cols);
            }
        });
        values
    }

    fn value(&self, seed: u64, i: usize, cols: usize) -> f32 {
        let word = || hash(seed, i as u64);
        match self {
            Fill::Normal(deviation) => deviation * normal(word()),
            Fill::Uniform(low, high) => low + (high - low) * unit(word()),
            Fill::Constant(value) => *value,
            Fill::ConstantRows => normal(hash(seed, (i / cols) as u64)),
            Fill::Identity => f32::from(u8::from(i / cols == i % cols)),
            Fill::NearlyConstant { mean, rarity } => {
                let neighbour = bf16::from_bits(bf16::from_f32(*mean).to_bits() + 1).to_f32();
                if word().is_multiple_of(*rarity) { neighbour } else { *mean }
            }
            Fill::Values(values) => values[i % values.len()],
            Fill::Ids(_) | Fill::Words(_) => f32::NAN,
            Fill::WithNan(_, at) if i == *at => f32::NAN,
            Fill::WithNan(fill, _) => fill.value(seed, i, cols),
        }
    }

    /// `n` ids or words, if this is a fill of such.
    pub fn ids(&self, seed: u64, n: usize) -> Option<Vec<u32>> {
        let id = |i: usize, below: u32| match i {
            0 => below - 1,
            1 => 0,
            _ => (hash(seed, i as u64) % u64::from(below)) as u32,
        };
        match self {
            Fill::Ids(below) => Some((0..n).map(|i| id(i, *below)).collect()),
            Fill::Words(words) => Some((0..n).map(|i| words[i % words.len()]).collect()),
            _ => None,
        }
    }
}

/// Rounds to what bf16 can hold.
pub(super) fn round_to_bf16(values: &mut [f32]) {
    values.par_iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
}

/// The seed that belongs to a name (FNV-1a).
pub(super) fn seed(name: &str) -> u64 {
    let step = |hash: u64, &byte: &u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    name.as_bytes().iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) of the `i`-th state.
fn hash(seed: u64, i: u64) -> u64 {
    let mut z = seed.wrapping_add(i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn unit(word: u64) -> f32 {
    (word >> 40) as f32 / (1u64 << 24) as f32
}

/// Mean 0 and variance 1 from the four quarters of a word.
fn normal(word: u64) -> f32 {
    let sum: u64 = (0..4).map(|quarter| (word >> (16 * quarter)) & 0xffff).sum();
    (sum as f32 - 131_070.0) / 37_837.2
}

/// The weights of a case, in memory.
pub(super) struct CaseWeights {
    weights: HashMap<String, (DType, Vec<usize>, Vec<u8>)>,
}

impl CaseWeights {
    /// Makes every weight that `graphs` read. `fill` says how one called so is filled and
    /// of which type it is.
    pub fn of(
        graphs: &[Graph],
        seed_of_case: u64,
        fill: impl Fn(&str) -> Option<(Fill, DType)>,
    ) -> Self {
        let mut weights = HashMap::new();
        for weight in graphs.iter().flat_map(Graph::weights) {
            if weights.contains_key(&weight.name) {
                continue;
            }
            let shape = &weight.shape;
            let (fill, dtype) = fill(&weight.name)
                .unwrap_or_else(|| (default_fill(&weight.name, shape), DType::Bf16));
            let values = fill.values(seed_of_case ^ seed(&weight.name), shape);
            let bytes = match dtype {
                DType::F32 => bytemuck::cast_slice(&values).to_vec(),
                _ => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            };
            weights.insert(weight.name.clone(), (dtype, shape.clone(), bytes));
        }
        CaseWeights { weights }
    }
}

/// Matrices keep the size of what they multiply; weights of norms are near one.
fn default_fill(name: &str, shape: &[usize]) -> Fill {
    if shape.len() >= 2 {
        let inner: usize = shape[1..].iter().product();
        Fill::Normal(1.0 / (inner as f32).sqrt())
    } else if name.ends_with("weight") {
        Fill::Uniform(0.5, 1.5)
    } else {
        Fill::Normal(0.5)
    }
}

impl WeightSource for CaseWeights {
    fn weight(&self, name: &str) -> Result<WeightView<'_>> {
        let (dtype, shape, bytes) = self
            .weights
            .get(name)
            .ok_or_else(|| Error::model(format!("the case has no weight {name}")))?;
        Ok(WeightView { dtype: *dtype, shape, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::Fill;

    #[test]
    fn fills_are_what_they_say() {
        let values = Fill::Normal(2.0).values(7, &[250, 400]);
        let n = values.len() as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let variance = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n;
        assert!(mean.abs() < 0.03 && (variance - 4.0).abs() < 0.1, "{mean} {variance}");
        assert_eq!(values, Fill::Normal(2.0).values(7, &[250, 400]));
        assert_ne!(values, Fill::Normal(2.0).values(8, &[250, 400]));

        assert_eq!(Fill::Identity.values(0, &[2, 3]), [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]);
        let nearly = Fill::NearlyConstant { mean: 1000.0, rarity: 24 }.values(1, &[2400]);
        let steps = nearly.iter().filter(|&&v| v == 1004.0).count();
        assert!((50..200).contains(&steps) && nearly.iter().all(|&v| v == 1000.0 || v == 1004.0));
        let rows = Fill::ConstantRows.values(1, &[2, 2]);
        assert!(rows[0] == rows[1] && rows[2] == rows[3] && rows[0] != rows[2]);
        let nan = Fill::Constant(1.0).with_nan(1).values(0, &[3]);
        assert_eq!(nan.iter().map(|v| v.is_nan()).collect::<Vec<_>>(), [false, true, false]);

        let ids = Fill::Ids(11).ids(3, 40).expect("ids");
        assert!(ids[0] == 10 && ids[1] == 0 && ids.iter().all(|&id| id < 11));
        assert_eq!(Fill::Constant(1.0).ids(3, 4), None);
    }
}
