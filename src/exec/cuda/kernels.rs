//! The kernels built into the program: which file holds which, how many threads and how much
//! shared memory each takes. All of them are looked up when a GPU is opened, so that one
//! that is missing shows then.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;

use super::driver::{self, Context, Kernel, Module};
use super::images::{self, IMAGES};
use super::params::PackConv;
use super::step::{Parameters, Work};
use crate::{Error, Result};

/// The entry points of one source file.
struct File {
    name: &'static str,
    /// Name, threads of a block, most dynamic shared memory in bytes.
    entries: &'static [(&'static str, u32, u32)],
}

/// Threads of a block of the kernels that give each thread one vector.
pub(super) const BLOCK: u32 = 256;

const FILES: &[File] = &[
    File {
        name: "pointwise",
        entries: &[
            ("activate_v8", BLOCK, 0),
            ("activate_v1", BLOCK, 0),
            ("gated_gelu_v8", BLOCK, 0),
            ("gated_gelu_v1", BLOCK, 0),
            ("embedding_v8", BLOCK, 0),
            ("embedding_v1", BLOCK, 0),
            ("timestep_embedding", BLOCK, 0),
            ("patchify", BLOCK, 0),
            ("unpatchify", BLOCK, 0),
            ("add_position_table_v8", BLOCK, 0),
            ("add_position_table_v1", BLOCK, 0),
            ("guided_euler", BLOCK, 0),
            ("pack_conv", BLOCK, 0),
            ("rgb8", BLOCK, 0),
        ],
    },
    File { name: "noise", entries: &[("normal_noise", BLOCK, 0)] },
    File {
        name: "resize",
        entries: &[("bilinear_half", BLOCK, 0), ("nearest_double_renoise", BLOCK, 0)],
    },
    File {
        name: "norm",
        entries: &[
            ("layer_norm_v8", 128, 0),
            ("layer_norm_v1", 128, 0),
            ("layer_norm_modulate_v8", 128, 0),
            ("layer_norm_modulate_v1", 128, 0),
            ("rms_norm_v8", 128, 0),
            ("rms_norm_v1", 128, 0),
            ("head_norm_rope", 128, 0),
        ],
    },
    File {
        name: "group_norm",
        entries: &[
            ("group_norm_sums", 256, 0),
            ("group_norm_finish", 256, 0),
            ("group_norm_apply_v8", 256, 0),
            ("group_norm_apply_v1", 256, 0),
        ],
    },
    File {
        name: "attention",
        entries: &[
            ("attention_64", 128, 0),
            ("attention_64_masked", 128, 0),
            ("attention_16_masked", 128, 0),
        ],
    },
    File { name: "attention_wide", entries: &[("attention_wide", 256, 99_072)] },
    File { name: "attention_sm90", entries: &[("attention_sm90_64", 512, 214_320)] },
    File {
        name: "gemm",
        entries: &[
            ("gemm_256x128", 256, 73_728),
            ("gemm_128x128", 128, 49_152),
            ("gemm_128x64", 128, 49_152),
            ("gemm_64x64", 128, 49_152),
            ("gemm_16x64", 128, 40_960),
            ("gemm_128x32", 128, 40_960),
            ("gemm_128x16", 128, 36_864),
        ],
    },
    File {
        name: "gemm_sm90",
        entries: &[
            ("gemm_sm90_128x128_pair", 384, 229_536),
            ("gemm_sm90_128x128_pair_heads", 384, 229_536),
            ("gemm_sm90_128x192", 384, 213_120),
            ("gemm_sm90_128x192_heads", 384, 213_120),
            ("gemm_sm90_64x192_pair", 384, 213_152),
            ("gemm_sm90_64x192_pair_heads", 384, 213_152),
            ("gemm_sm90_64x64", 384, 229_648),
            ("gemm_sm90_64x64_heads", 384, 229_648),
            ("gemm_sm90_128x64", 384, 213_184),
            ("gemm_sm90_128x64_heads", 384, 213_184),
            ("gemm_sm90_128x64_split2", 384, 229_568),
            ("gemm_sm90_128x64_split2_heads", 384, 229_568),
            ("gemm_sm90_128x64_split4", 384, 213_168),
            ("gemm_sm90_128x64_split4_heads", 384, 213_168),
            ("gemm_sm90_128x128_f32", 384, 229_472),
            ("gemm_sm90_128x64_f32", 384, 229_504),
        ],
    },
    File {
        name: "conv3d",
        entries: &[
            ("conv3d_256x128", 256, 73_856),
            ("conv3d_128x128", 128, 49_280),
            ("conv3d_128x64", 128, 49_280),
            ("conv3d_64x64", 128, 49_280),
            ("conv3d_128x32", 128, 41_088),
            ("conv3d_128x16", 128, 36_992),
            ("conv3d_any_128x64", 128, 49_280),
            ("conv3d_any_128x32", 128, 41_088),
        ],
    },
    File {
        name: "conv3d_sm90",
        entries: &[
            ("conv3d_sm90_256x128", 384, 229_440),
            ("conv3d_sm90_128x256_pair", 384, 229_440),
            ("conv3d_sm90_128x128", 384, 229_472),
            ("conv3d_sm90_128x64", 384, 229_504),
        ],
    },
];

/// The kernels that run on one GPU.
pub(super) struct Kernels {
    modules: Vec<Arc<Module>>,
    kernels: HashMap<&'static str, Kernel>,
    /// Number of multiprocessors.
    pub multiprocessors: u32,
    /// Whether the kernels for sm_90 may be used.
    pub hopper: bool,
}

impl Kernels {
    /// Loads the best image of every file for a GPU of this compute capability.
    pub fn load(context: &Arc<Context>, capability: (u32, u32)) -> Result<Kernels> {
        let chosen = images::choose(IMAGES, capability);
        let (mut modules, mut kernels) = (Vec::new(), HashMap::new());
        let mut hopper = true;
        let starts_early = driver::starts_early()?;
        for file in FILES {
            let Some(image) = chosen.iter().find(|image| image.file == file.name) else {
                // `probe::require` has seen to it that only variants for sm_90 can be missing.
                hopper = false;
                continue;
            };
            // The instructions for it are those of sm_90.
            let early = starts_early && image.compiled_for().is_some_and(|arch| arch.number >= 90);
            let module = Arc::new(Module::new(context, file.name, image.bytes, early)?);
            for &(name, block, shared) in file.entries {
                kernels.insert(name, module.kernel(name, block, shared)?);
            }
            modules.push(module);
        }
        let multiprocessors = context.attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        Ok(Kernels { modules, kernels, multiprocessors, hopper })
    }

    /// The same without the kernels of one generation.
    pub fn generic(&self) -> Kernels {
        Kernels {
            modules: self.modules.clone(),
            kernels: self.kernels.clone(),
            multiprocessors: self.multiprocessors,
            hopper: false,
        }
    }

    /// The kernel `name`.
    pub fn get(&self, name: &str) -> Result<Kernel> {
        let found = self.kernels.get(name).copied();
        found.ok_or_else(|| Error::device(format!("there is no kernel {name}")))
    }

    /// The launch that packs the weights of a convolution, of which `elements` are written.
    pub fn pack_conv(&self, elements: usize, parameters: &PackConv) -> Result<Work> {
        Ok(Work::Launch {
            kernel: self.get("pack_conv")?,
            grid: [blocks(elements, BLOCK as usize)?, 1, 1],
            parameters: Parameters::new(parameters),
        })
    }
}

/// Number of blocks of `per_block` items each.
pub(super) fn blocks(items: usize, per_block: usize) -> Result<u32> {
    let count = items.div_ceil(per_block);
    match i32::try_from(count) {
        Ok(count) => Ok(count as u32),
        Err(_) => Err(Error::device(format!("{items} items are too many for one launch"))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    /// A kernel that starts early and does not wait would read what is not there yet, and no test
    /// of results finds that every time.
    #[test]
    fn every_kernel_waits_for_the_one_before_it() {
        const CALL: &str = "after_predecessor();";
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let main_loop = fs::read_to_string(folder.join("lib/gemm_sm90.cuh")).expect("its source");
        // The producer and the consumers.
        assert_eq!(main_loop.matches(CALL).count(), 2);
        for file in super::FILES {
            let path = folder.join(file.name).with_extension("cu");
            let source = fs::read_to_string(&path).expect("its source");
            if source.contains("multiply_tiles<") {
                continue;
            }
            let bodies: Vec<&str> = source.split("__global__").skip(1).collect();
            assert_eq!(bodies.len(), file.entries.len(), "entry points of {}", file.name);
            for body in bodies {
                assert!(body.contains(CALL), "{}: {}", file.name, &body[..80]);
            }
        }
    }
}
