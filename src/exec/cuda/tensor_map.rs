//! Tensor maps: how the copy engine of sm_90 sees a matrix or a video in device memory.

use cudarc::driver::sys;

use super::driver::check;
use super::params::TensorMap;
use super::session::Place;
use crate::{Error, Result};

/// Elements of a box's fastest dimension: 128 bytes of bf16, the width of the swizzle.
pub(super) const BOX_COLUMNS: usize = 64;

/// A bf16 matrix read in boxes of [`BOX_COLUMNS`] columns and `rows` rows.
pub(super) fn matrix(place: Place, rows: usize) -> Result<TensorMap> {
    encode(
        place.address,
        &[place.cols as u64, place.rows as u64],
        &[2 * place.stride as u64],
        &[BOX_COLUMNS as u32, rows as u32],
        &[1, 1],
    )
}

/// A bf16 video `[frames, height, width, channels]` read in boxes of [`BOX_COLUMNS`]
/// channels and `width × height` pixels of one frame, every `stride`-th pixel (in height,
/// width).
pub(super) fn video(
    address: u64,
    [frames, height, width, channels]: [usize; 4],
    [box_height, box_width]: [usize; 2],
    [stride_y, stride_x]: [usize; 2],
) -> Result<TensorMap> {
    let pixel = 2 * channels as u64;
    encode(
        address,
        &[channels as u64, width as u64, height as u64, frames as u64],
        &[pixel, pixel * width as u64, pixel * (width * height) as u64],
        // A box spans the pixels that are skipped, too.
        &[BOX_COLUMNS as u32, (box_width * stride_x) as u32, (box_height * stride_y) as u32, 1],
        &[1, stride_x as u32, stride_y as u32, 1],
    )
}

/// `strides` are those of all dimensions but the first, in bytes.
fn encode(
    address: u64,
    extents: &[u64],
    strides: &[u64],
    extent_of_box: &[u32],
    element_strides: &[u32],
) -> Result<TensorMap> {
    let aligned = address.is_multiple_of(16) && strides.iter().all(|s| s.is_multiple_of(16));
    if !aligned {
        return Err(Error::device("a tensor for the copy engine is not aligned to 16 bytes"));
    }
    // The driver writes a map at an address that is a multiple of 64.
    let mut map = TensorMap { words: [0; 16] };
    // SAFETY: the arrays have `extents.len()` entries (one less for the strides), and the
    // map is 128 bytes aligned to 64, which is what the driver asks for.
    let answer = unsafe {
        sys::cuTensorMapEncodeTiled(
            (&raw mut map).cast(),
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            extents.len() as u32,
            address as *mut _,
            extents.as_ptr(),
            strides.as_ptr(),
            extent_of_box.as_ptr(),
            element_strides.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        .result()
    };
    check("describing a tensor to the copy engine", answer)?;
    Ok(map)
}
