//! `torch.save` archives: whole, strided, hostile and damaged ones.

use std::fs;
use std::io::{Cursor, Write};

use proptest::prelude::*;
use pyraflow::ErrorKind;
use pyraflow::checkpoint::{Checkpoint, Component};
use pyraflow::tensor::{DType, WeightSource};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::{copy_of, golden, replace, values};

/// A golden checkpoint whose VAE is whatever archive a test writes.
struct Bench {
    dir: tempfile::TempDir,
    checkpoint: Checkpoint,
}

type Values = Vec<(String, Vec<usize>, Vec<u32>)>;

impl Bench {
    fn new() -> Self {
        let dir = copy_of("flux");
        let checkpoint = Checkpoint::open(dir.path(), None).unwrap();
        Bench { dir, checkpoint }
    }

    fn read(&self, bytes: &[u8]) -> Result<Values, pyraflow::Error> {
        let path = self.dir.path().join("causal_video_vae/diffusion_pytorch_model.bin");
        replace(&path, bytes);
        self.checkpoint.source_weights(Component::Vae).map(|weights| values(&weights))
    }

    fn refuse(&self, bytes: &[u8]) -> String {
        let error = self.read(bytes).expect_err("a bad archive was read");
        assert_eq!(error.kind(), ErrorKind::Model);
        assert!(error.to_string().contains("diffusion_pytorch_model.bin"), "{error}");
        error.to_string()
    }
}

/// An archive of stored records.
fn archive(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in records {
        zip.start_file(*name, options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Writes pickles, opcode by opcode.
#[derive(Default)]
struct Pickle(Vec<u8>);

impl Pickle {
    fn op(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn start() -> Self {
        Pickle::default().op(b"\x80\x02}(")
    }

    fn stop(self) -> Vec<u8> {
        self.op(b"u.").0
    }

    fn text(self, text: &str) -> Self {
        let len = u32::try_from(text.len()).unwrap().to_le_bytes();
        self.op(b"X").op(&len).op(text.as_bytes())
    }

    fn int(self, value: i64) -> Self {
        match i32::try_from(value) {
            Ok(value) => self.op(b"J").op(&value.to_le_bytes()),
            Err(_) => self.op(b"\x8a\x08").op(&value.to_le_bytes()),
        }
    }

    fn ints(self, values: &[i64]) -> Self {
        values.iter().fold(self.op(b"("), |p, &v| p.int(v)).op(b"t")
    }

    fn import(self, module: &str, name: &str) -> Self {
        self.op(format!("c{module}\n{name}\n").as_bytes())
    }

    fn storage(self, kind: &str, key: &str, len: i64) -> Self {
        self.op(b"(").text("storage").import("torch", kind).text(key).text("cpu").int(len).op(b"tQ")
    }

    /// A key and a call of `_rebuild_tensor_v2`.
    fn tensor(
        self,
        name: &str,
        storage: (&str, &str, i64),
        offset: i64,
        shape: &[i64],
        strides: &[i64],
    ) -> Self {
        self.text(name)
            .import("torch._utils", "_rebuild_tensor_v2")
            .op(b"(")
            .storage(storage.0, storage.1, storage.2)
            .int(offset)
            .ints(shape)
            .ints(strides)
            .op(b"\x89")
            .import("collections", "OrderedDict")
            .op(b")Rt")
            .op(b"R")
    }
}

/// One tensor of these numbers in a storage of six floats.
fn one_tensor(len: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let pickle = Pickle::start().tensor("t", ("FloatStorage", "0", len), offset, shape, strides);
    let data = floats(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    archive(&[("m/data.pkl", &pickle.stop()), ("m/data/0", &data)])
}

#[test]
fn tensors_of_any_layout_are_read() {
    let bench = Bench::new();
    let read = |offset, shape: &[i64], strides: &[i64]| {
        let values = bench.read(&one_tensor(6, offset, shape, strides)).unwrap();
        values[0].2.iter().map(|&bits| f32::from_bits(bits)).collect::<Vec<_>>()
    };
    assert_eq!(read(0, &[2, 3], &[3, 1]), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    assert_eq!(read(0, &[3, 2], &[1, 3]), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    assert_eq!(read(1, &[2, 2], &[3, 1]), [1.0, 2.0, 4.0, 5.0]);
    assert_eq!(read(4, &[2], &[1]), [4.0, 5.0]);
    assert_eq!(read(1, &[1, 3], &[i64::MAX, 2]), [1.0, 3.0, 5.0]);
    assert_eq!(read(5, &[], &[]), [5.0]);
    assert_eq!(read(6, &[0], &[1]), [0.0; 0]);
    assert_eq!(read(2, &[2], &[0]), [2.0, 2.0]);
}

#[test]
fn every_allowed_import_works() {
    let bench = Bench::new();
    // An OrderedDict with BUILD, as state dicts are saved; three number types; a Parameter; a
    // tensor with attributes.
    let pickle = Pickle::default()
        .op(b"\x80\x02")
        .import("collections", "OrderedDict")
        .op(b")Rq\x00(")
        .tensor("half", ("HalfStorage", "h", 2), 0, &[2], &[1])
        .tensor("brain", ("BFloat16Storage", "b", 2), 0, &[2], &[1])
        .text("parameter")
        .import("torch._utils", "_rebuild_parameter")
        .op(b"(")
        .tensor("", ("FloatStorage", "f", 1), 0, &[1], &[1])
        .op(b"\x88")
        .import("collections", "OrderedDict")
        .op(b")RtR");
    // `tensor` also pushes a name, which a Parameter's arguments do not have.
    let bytes = pickle.0;
    let name = b"X\x00\x00\x00\x00";
    let at = bytes.windows(5).position(|w| w == name).unwrap();
    let bytes = [&bytes[..at], &bytes[at + 5..]].concat();
    let pickle = Pickle(bytes)
        .text("attributes")
        .import("torch._tensor", "_rebuild_from_type_v2")
        .op(b"(")
        .import("torch._utils", "_rebuild_tensor_v2")
        .import("torch", "Tensor")
        .op(b"(")
        .storage("FloatStorage", "f", 1)
        .op(b"K\x00K\x01\x85K\x01\x85\x89}t")
        .op(b"}")
        .text("note")
        .op(b"]G\x00\x00\x00\x00\x00\x00\x00\x00as")
        .op(b"tR")
        .op(b"u}")
        .text("_metadata")
        .op(b"h\x00sb.");
    let file = archive(&[
        ("any name/data.pkl", &pickle.0),
        ("any name/byteorder", b"little"),
        ("any name/data/h", &[0x00, 0x3c, 0x00, 0xc0]),
        ("any name/data/b", &[0x80, 0x3f, 0x00, 0xc0]),
        ("any name/data/f", &floats(&[7.5])),
    ]);
    let expected: [(&str, &[f32]); 4] = [
        ("attributes", &[7.5]),
        ("brain", &[1.0, -2.0]),
        ("half", &[1.0, -2.0]),
        ("parameter", &[7.5]),
    ];
    let read = bench.read(&file).unwrap();
    assert_eq!(read.len(), expected.len());
    for ((name, _, bits), (wanted, values)) in read.iter().zip(expected) {
        assert_eq!(name, wanted);
        assert_eq!(*bits, values.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
    }
}

#[test]
fn other_imports_are_refused_by_name() {
    let bench = Bench::new();
    for (module, name) in [
        ("os", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch", "IntStorage"),
        ("collections", "deque"),
        ("torch._utils", "_rebuild_sparse_tensor"),
    ] {
        let pickle = Pickle::default().op(b"\x80\x02").import(module, name).op(b"(");
        let pickle = pickle.text("touch /tmp/owned").op(b"tR.");
        let text = bench.refuse(&archive(&[("m/data.pkl", &pickle.0)]));
        assert!(text.contains(&format!("{module}.{name}")), "{text}");
    }
}

#[test]
fn sizes_that_lie_are_refused() {
    let bench = Bench::new();
    let max = i64::MAX;
    for (len, offset, shape, strides) in [
        (7, 0, &[6][..], &[1][..]),
        (5, 0, &[5], &[1]),
        (max, 0, &[6], &[1]),
        (-6, 0, &[6], &[1]),
        (6, 1, &[6], &[1]),
        (6, 7, &[0], &[1]),
        (6, -1, &[6], &[1]),
        (6, max, &[1], &[1]),
        (6, 0, &[7], &[1]),
        (6, 0, &[-1], &[1]),
        (6, 0, &[2, 3], &[4, 1]),
        (6, 0, &[2], &[max]),
        (6, 0, &[3], &[max]),
        (6, 0, &[max, max, 4], &[0, 0, 0]),
        // One number, repeated a million times: memory out of nothing.
        (6, 0, &[1_000_000], &[0]),
        (6, 0, &[2, 3], &[1]),
        (6, 0, &[1; 9], &[1; 9]),
    ] {
        bench.refuse(&one_tensor(len, offset, shape, strides));
    }
    // Each within its storage, but together larger than the file.
    let many = (0..200).fold(Pickle::start(), |p, i| {
        p.tensor(&format!("t{i}"), ("FloatStorage", "0", 4096), 0, &[64, 64], &[1, 64])
    });
    let text = bench.refuse(&archive(&[("m/data.pkl", &many.stop()), ("m/data/0", &[0; 16384])]));
    assert!(text.contains("larger than the file"), "{text}");
}

#[test]
fn programs_that_make_no_state_dict_are_refused() {
    let bench = Bench::new();
    let deep = [b"\x80\x02".to_vec(), b")".repeat(200_000), b".".to_vec()].concat();
    let marks = [b"\x80\x02".to_vec(), b"(".repeat(200_000)].concat();
    let nested = [b"\x80\x02)".to_vec(), b"\x85".repeat(1_000_000), b".".to_vec()].concat();
    let long = vec![b'N'; 5 << 20];
    let twice = Pickle::start()
        .tensor("t", ("FloatStorage", "0", 1), 0, &[1], &[1])
        .tensor("t", ("FloatStorage", "0", 1), 0, &[1], &[1])
        .stop();
    for pickle in [
        &b""[..],
        b".",
        b"\x80\x02.",
        b"\x80\x02N.",
        b"\x80\x04}.",
        b"\x80\x02}(K\x01K\x02u.",
        b"\x80\x02}(X\x01\x00\x00\x00aNu.",
        b"\x80\x02}X\x01\x00\x00\x00a}s.",
        b"\x80\x02}(Nu.",
        b"\x80\x02h\x07.",
        b"\x80\x02K\x01Q.",
        b"\x80\x02ccollections\nOrderedDict\n)RR.",
        b"\x80\x02cos",
        b"\x80\x02X\xff\xff\xff\xffa",
        b"\x80\x02\x8a\xff",
        b"\x80\x02i",
        b"\x80\x02NNb.",
        &deep,
        &marks,
        &nested,
        &long,
        &twice,
    ] {
        bench.refuse(&archive(&[("m/data.pkl", pickle), ("m/data/0", &[0; 4])]));
    }
    assert_eq!(bench.read(&archive(&[("m/data.pkl", b"\x80\x02}.")])).unwrap().len(), 0);
}

#[test]
fn archives_must_be_plain_and_whole() {
    let bench = Bench::new();
    let pickle = Pickle::start().tensor("t", ("FloatStorage", "0", 1), 0, &[1], &[1]).stop();
    let data = [0; 4];
    bench.read(&archive(&[("m/data.pkl", &pickle), ("m/data/0", &data)])).unwrap();
    let missing = bench.refuse(&archive(&[("m/data.pkl", &pickle)]));
    assert!(missing.contains("m/data/0"), "{missing}");
    bench.refuse(&archive(&[("data/0", &data)]));
    bench.refuse(&archive(&[
        ("m/data.pkl", &pickle),
        ("n/data.pkl", &pickle),
        ("m/data/0", &data),
    ]));
    let big = [("m/data.pkl", &pickle[..]), ("m/byteorder", b"big"), ("m/data/0", &data)];
    assert!(bench.refuse(&archive(&big)).contains("big-endian"));
    // An older torch file is a bare pickle.
    bench.refuse(&pickle);

    // The records said to be deflated: what a bomb would be.
    let mut compressed = archive(&[("m/data.pkl", &pickle), ("m/data/0", &data)]);
    let central: Vec<_> = (0..compressed.len() - 4)
        .filter(|&at| compressed[at..].starts_with(b"PK\x01\x02"))
        .collect();
    compressed[central[1] + 10] = 8;
    let text = bench.refuse(&compressed);
    assert!(text.contains("compressed"), "{text}");
    // A record said to be larger than the file, in one and in both of its sizes.
    let plain = archive(&[("m/data.pkl", &pickle), ("m/data/0", &data)]);
    for fields in [&[20][..], &[24], &[20, 24]] {
        let mut lying = plain.clone();
        for field in fields {
            let at = central[1] + field;
            lying[at..at + 4].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        }
        bench.refuse(&lying);
    }
}

#[test]
fn truncated_archives_are_refused() {
    let bench = Bench::new();
    let whole =
        fs::read(golden("flux").join("causal_video_vae/diffusion_pytorch_model.bin")).unwrap();
    let end = whole.len();
    let coarse = (0..end).step_by(end / 50);
    for len in coarse.chain(end - 100..end) {
        bench.refuse(&whole[..len]);
    }
    bench.read(&whole).unwrap();
}

/// Where the pickle lies in the golden archive.
fn pickle_range(whole: &[u8]) -> std::ops::Range<usize> {
    let start = whole.windows(3).position(|w| w == b"\x80\x02c").unwrap();
    // The end of a state dict with its metadata built in.
    let len = whole[start..].windows(5).position(|w| w == b"usb.P" || w == b"usb.\0").unwrap() + 4;
    start..start + len
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    /// Any byte of the pickle or of the directory changed: an error, or tensors within the file.
    #[test]
    fn changed_bytes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4), directory: bool) {
        thread_local!(static BENCH: (Bench, Vec<u8>) = (
            Bench::new(),
            fs::read(golden("flux").join("causal_video_vae/diffusion_pytorch_model.bin")).unwrap(),
        ));
        BENCH.with(|(bench, whole)| {
            let range = if directory {
                let start = whole.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
                start..whole.len()
            } else {
                pickle_range(whole)
            };
            let mut bytes = whole.clone();
            for (index, value) in changes {
                bytes[range.start + index.index(range.len())] = value;
            }
            if let Err(error) = bench.read(&bytes) {
                assert_eq!(error.kind(), ErrorKind::Model);
            }
        });
    }
}

/// Random programs, most of whose bytes are opcodes that the machine knows.
#[test]
fn random_programs_never_panic() {
    let bench = Bench::new();
    let opcodes =
        b"\x80\x02(N\x88\x89GKMJX\x8aqrhj)\x85\x86\x87t]ae}suRbQc.\x00\x01torch\nFloatStorage\n";
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize
    };
    for _ in 0..3000 {
        let mut pickle = b"\x80\x02".to_vec();
        for _ in 0..next() % 60 {
            match next() % 8 {
                0 => pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n"),
                1 => pickle.extend(b"ccollections\nOrderedDict\n)R"),
                2 => pickle.extend(Pickle::default().storage("FloatStorage", "0", 1).0),
                _ => pickle.push(opcodes[next() % opcodes.len()]),
            }
        }
        pickle.push(b'.');
        if let Err(error) = bench.read(&archive(&[("m/data.pkl", &pickle), ("m/data/0", &[0; 4])]))
        {
            assert_eq!(error.kind(), ErrorKind::Model);
        }
    }
}

#[test]
fn the_golden_archive_keeps_types_and_shapes() {
    let checkpoint = Checkpoint::open(&golden("flux"), None).unwrap();
    let weights = checkpoint.source_weights(Component::Vae).unwrap();
    let view = weights.weight("post_quant_conv.conv.weight").unwrap();
    assert_eq!((view.dtype, view.shape), (DType::F32, &[16, 16, 1, 1, 1][..]));
}
