//! Pictures in, videos out.
//!
//! * [`load_image`] reads a PNG, JPEG or WebP file as RGB at the size that a model wants.
//! * [`open_sink`] takes the frames of a video one by one and writes an MP4, a GIF, PNG
//!   files or raw y4m; what it writes is complete or absent, never half a file.
//! * [`inspect`] reads back what such a file says about itself.
//!
//! Every picture inside the program is a [`Frame`]: 8-bit sRGB, row by row.

mod frame;
mod gif;
mod h264;
mod image;
mod inspect;
mod inspect_mp4;
mod live;
mod mp4;
mod output;
mod pending;
mod png;
mod y4m;
mod yuv;

pub use frame::Frame;
pub use image::{Fit, load_image, probe_image};
pub use inspect::{MediaInfo, inspect};
pub use output::{
    Format, FrameSink, Metadata, OutputTarget, VideoSpec, check_file_target, check_target,
    open_sink,
};
pub use png::write_png;
