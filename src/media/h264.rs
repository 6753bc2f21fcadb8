//! H.264 through OpenH264, at one fixed quality.

use openh264::OpenH264API;
use openh264::encoder::{
    BitRate, Complexity, Encoder, EncoderConfig, FrameRate, FrameType, IntraFramePeriod, Profile,
    QpRange, RateControlMode, SpsPpsStrategy, UsageType, VuiConfig,
};
use openh264::formats::YUVSlices;

use super::VideoSpec;
use super::yuv::Yuv420;
use crate::{Error, ErrorKind, Result};

/// Quantiser of every block, 0 (best) to 51: beyond what the eye tells from the source.
const QP: u8 = 18;
/// A key frame at least every two seconds, so that players can seek.
const KEY_FRAME_SECONDS: u32 = 2;

const NAL_TYPE: u8 = 0x1F;
const NAL_SPS: u8 = 7;
const NAL_PPS: u8 = 8;

/// What a decoder must know before the first picture: the NAL units, without start codes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct ParameterSets {
    pub(super) sps: Vec<u8>,
    pub(super) pps: Vec<u8>,
}

/// One coded picture: NAL units, each after its length in 4 bytes (big endian).
pub(super) struct Sample {
    pub(super) data: Vec<u8>,
    /// Whether decoding can start here.
    pub(super) key: bool,
}

/// Turns pictures into samples, one for one. The same pictures give the same bytes.
pub(super) struct AvcEncoder {
    encoder: Encoder,
    parameters: ParameterSets,
}

impl AvcEncoder {
    pub(super) fn new(spec: &VideoSpec) -> Result<Self> {
        let rate = spec.fps_num as f32 / spec.fps_den as f32;
        // Quality does not depend on the bit rate, but the level that the file announces
        // does: a bit per pixel is more than this quantiser makes of most pictures.
        let bits = spec.width as f32 * spec.height as f32 * rate;
        let period = (KEY_FRAME_SECONDS * spec.fps_num).div_ceil(spec.fps_den).max(1);
        let config = EncoderConfig::new()
            .profile(Profile::High)
            // OpenH264 without rate control takes a quantiser that the crate cannot set (26);
            // the quality mode with a range of one value takes that value.
            .rate_control_mode(RateControlMode::Quality)
            .qp(QpRange::new(QP, QP))
            .bitrate(BitRate::from_bps(bits.clamp(1e5, 1e8) as u32))
            .skip_frames(false)
            .max_frame_rate(FrameRate::from_hz(rate))
            // The library accepts this usage and screen sharing, and no other.
            .usage_type(UsageType::CameraVideoRealTime)
            .complexity(Complexity::High)
            // Both would spend fewer bits on calm areas, where the eye sees it.
            .adaptive_quantization(false)
            .background_detection(false)
            .intra_frame_period(IntraFramePeriod::from_num_frames(period))
            .sps_pps_strategy(SpsPpsStrategy::ConstantId)
            // The number of threads decides the slices and so the bytes.
            .num_threads(1)
            .vui(VuiConfig::bt709());
        let mut encoder =
            Encoder::with_api_config(OpenH264API::from_source(), config).map_err(failed)?;
        silence(&mut encoder)?;
        Ok(AvcEncoder { encoder, parameters: ParameterSets::default() })
    }

    /// The parameter sets of all samples, once there is one.
    pub(super) fn parameters(&self) -> &ParameterSets {
        &self.parameters
    }

    pub(super) fn encode(&mut self, picture: &Yuv420) -> Result<Sample> {
        let (width, height) = picture.size();
        let source =
            YUVSlices::new(picture.planes(), (width, height), (width, width / 2, width / 2));
        let stream = self.encoder.encode(&source).map_err(failed)?;
        let kind = stream.frame_type();
        let mut data = Vec::new();
        let mut found = ParameterSets::default();
        for layer in (0..stream.num_layers()).filter_map(|i| stream.layer(i)) {
            for unit in (0..layer.nal_count()).filter_map(|i| layer.nal_unit(i)) {
                let unit = without_start_code(unit)?;
                match unit.first().map(|byte| byte & NAL_TYPE) {
                    Some(NAL_SPS) => found.sps = unit.to_vec(),
                    Some(NAL_PPS) => found.pps = unit.to_vec(),
                    _ => {
                        let length = u32::try_from(unit.len()).map_err(failed)?;
                        data.extend_from_slice(&length.to_be_bytes());
                        data.extend_from_slice(unit);
                    }
                }
            }
        }
        if data.is_empty() || !matches!(kind, FrameType::IDR | FrameType::I | FrameType::P) {
            return Err(failed(format!("a frame was coded as {kind:?}")));
        }
        if self.parameters.sps.is_empty() {
            self.parameters = found;
        } else if found != ParameterSets::default() && found != self.parameters {
            return Err(failed("the parameter sets changed within a video"));
        }
        Ok(Sample { data, key: kind == FrameType::IDR })
    }
}

/// Keeps the library from writing to standard error: it warns that a fixed quality does not
/// keep to a bit rate. (The crate's own switch acts only after that warning.)
fn silence(encoder: &mut Encoder) -> Result<()> {
    // From the library's header codec_app_def.h.
    const ENCODER_OPTION_TRACE_LEVEL: i32 = 25;
    const WELS_LOG_QUIET: u32 = 0;
    let mut level = WELS_LOG_QUIET;
    // SAFETY: `raw_api` asks not to set parameters that the encoder relies on, and this one
    // is none. The option is allowed before initialisation and copies a u32 from a pointer,
    // which is valid during the call.
    let status = unsafe {
        encoder.raw_api().set_option(ENCODER_OPTION_TRACE_LEVEL, (&raw mut level).cast())
    };
    if status == 0 { Ok(()) } else { Err(failed(format!("it would not be quiet: {status}"))) }
}

/// A NAL unit of a byte stream (Rec. ITU-T H.264, annex B) without what comes before it.
fn without_start_code(unit: &[u8]) -> Result<&[u8]> {
    unit.strip_prefix(&[0, 0, 0, 1])
        .or_else(|| unit.strip_prefix(&[0, 0, 1]))
        .ok_or_else(|| failed("a unit has no start code"))
}

fn failed(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(ErrorKind::Io, "the H.264 encoder failed").because(reason)
}

#[cfg(test)]
mod tests {
    use openh264::decoder::Decoder;
    use openh264::formats::YUVSource;

    use super::super::Frame;
    use super::*;

    const SPEC: VideoSpec =
        VideoSpec { width: 128, height: 64, fps_num: 24, fps_den: 1, frames: 60 };

    /// Soft colours that drift, and after 30 frames a different scene.
    fn picture(index: u32) -> Frame {
        let scene = f64::from(index / 30) * 2.0;
        let wave = |p: f64| (128.0 + 100.0 * (p + scene + f64::from(index) / 12.0).sin()) as u8;
        Frame::from_fn(SPEC.width, SPEC.height, |x, y| {
            let (x, y) = (f64::from(x) / 20.0, f64::from(y) / 15.0);
            [wave(x), wave(y), wave(x + y)]
        })
        .unwrap()
    }

    fn encode_all() -> (ParameterSets, Vec<Sample>) {
        let mut encoder = AvcEncoder::new(&SPEC).unwrap();
        let mut planes = Yuv420::new(SPEC.width, SPEC.height);
        let mut samples = Vec::new();
        for index in 0..SPEC.frames {
            planes.fill(&picture(index));
            samples.push(encoder.encode(&planes).unwrap());
        }
        (encoder.parameters().clone(), samples)
    }

    fn annex_b(sample: &Sample) -> Vec<u8> {
        let mut stream = Vec::new();
        let mut rest = &sample.data[..];
        while let Some((length, after)) = rest.split_first_chunk() {
            let (unit, after) = after.split_at(u32::from_be_bytes(*length) as usize);
            stream.extend_from_slice(&[0, 0, 0, 1]);
            stream.extend_from_slice(unit);
            rest = after;
        }
        stream
    }

    #[test]
    fn decodes_to_what_went_in() {
        let (parameters, samples) = encode_all();
        let mut decoder = Decoder::new().unwrap();
        let mut planes = Yuv420::new(SPEC.width, SPEC.height);
        let headers = [&[0, 0, 0, 1], &parameters.sps[..], &[0, 0, 0, 1], &parameters.pps];
        for (index, sample) in samples.iter().enumerate() {
            let mut packet = if index == 0 { headers.concat() } else { Vec::new() };
            packet.extend(annex_b(sample));
            let decoded = decoder.decode(&packet).unwrap().expect("one picture per sample");
            planes.fill(&picture(index as u32));
            let (y, cb, cr) = planes.planes();
            let strides = decoded.strides();
            for (name, got, stride, want, width) in [
                ("Y", decoded.y(), strides.0, y, 128),
                ("Cb", decoded.u(), strides.1, cb, 64),
                ("Cr", decoded.v(), strides.2, cr, 64),
            ] {
                let psnr = psnr(got, stride, want, width);
                assert!(psnr > 42.0, "frame {index}, {name}: {psnr:.1} dB");
            }
        }
    }

    fn psnr(got: &[u8], stride: usize, want: &[u8], width: usize) -> f64 {
        let rows = got.chunks(stride).zip(want.chunks_exact(width));
        let squares: f64 = rows
            .flat_map(|(got, want)| got.iter().zip(want))
            .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
            .sum();
        10.0 * (255.0f64.powi(2) * want.len() as f64 / squares).log10()
    }

    #[test]
    fn same_pictures_give_the_same_bytes() {
        let ((sets_a, a), (sets_b, b)) = (encode_all(), encode_all());
        assert_eq!(sets_a, sets_b);
        assert!(a.iter().zip(&b).all(|(a, b)| a.data == b.data && a.key == b.key));
    }

    #[test]
    fn key_frames_come_in_time() {
        let (_, samples) = encode_all();
        let keys: Vec<usize> = (0..samples.len()).filter(|&i| samples[i].key).collect();
        assert_eq!(keys.first(), Some(&0));
        assert!(keys.windows(2).all(|k| k[1] - k[0] <= 48), "{keys:?}");
        assert!(keys.last().is_some_and(|k| samples.len() - k <= 48), "{keys:?}");
    }
}
