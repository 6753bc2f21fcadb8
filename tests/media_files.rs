//! Where videos go: targets that are refused before any work, and output that is complete or
//! absent whatever happens.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pyraflow::media::{
    Fit, Format, Frame, FrameSink, Metadata, OutputTarget, VideoSpec, check_target, load_image,
    open_sink,
};
use pyraflow::{ErrorKind, Result};
use tempfile::TempDir;

const SPEC: VideoSpec = VideoSpec { width: 64, height: 64, fps_num: 24, fps_den: 1, frames: 3 };

/// Noise, which no format makes small.
fn frame(index: u32) -> Frame {
    let mixed = |n: u32, by: u32| (n ^ n >> 15).wrapping_mul(by);
    let noise =
        |n: u32| mixed(mixed(mixed(n, 0x9E37_79B1), 0x85EB_CA6B), 0xC2B2_AE35).to_be_bytes();
    Frame::from_fn(64, 64, |x, y| {
        let [a, b, c, _] = noise((index * 64 + y) * 64 + x);
        [a, b, c]
    })
    .unwrap()
}

fn open(path: &Path, spec: &VideoSpec, overwrite: bool) -> Result<Box<dyn FrameSink>> {
    open_sink(&OutputTarget::parse(path)?, spec, &Metadata::default(), overwrite)
}

fn write(path: &Path, overwrite: bool) -> Result<()> {
    let mut sink = open(path, &SPEC, overwrite)?;
    (0..SPEC.frames).try_for_each(|index| sink.push(&frame(index)))?;
    sink.finish()
}

fn check(path: &Path, spec: &VideoSpec, overwrite: bool) -> Result<()> {
    check_target(&OutputTarget::parse(path).unwrap(), spec, overwrite)
}

#[track_caller]
fn assert_refused(result: Result<()>, kind: ErrorKind, reason: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(reason), "{error}");
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// One path per kind of output, in `directory`.
fn outputs(directory: &TempDir) -> Vec<PathBuf> {
    ["mp4", "gif", "y4m", "png"].map(|e| directory.path().join("a").with_extension(e)).to_vec()
}

#[test]
fn names_decide_the_format() {
    let format = |name: &str| match OutputTarget::parse(Path::new(name)) {
        Ok(OutputTarget::File { path, format }) => {
            assert_eq!(path, Path::new(name));
            Some(format)
        }
        Ok(OutputTarget::Stdout) => panic!("{name}"),
        Err(e) => {
            assert_eq!(e.kind(), ErrorKind::Usage);
            assert!(e.hint_text().is_some_and(|hint| hint.contains(".mp4")));
            None
        }
    };
    assert_eq!(format("a.mp4"), Some(Format::Mp4));
    assert_eq!(format("dir.x/a.b.GIF"), Some(Format::Gif));
    assert_eq!(format("a.png"), Some(Format::Png));
    assert_eq!(format("a.y4m"), Some(Format::Y4m));
    for name in ["a", "a.avi", ".mp4", "", "a.mp4/", "mp4"] {
        assert_eq!(format(name), None, "{name}");
    }
    assert_eq!(OutputTarget::parse(Path::new("-")).unwrap(), OutputTarget::Stdout);
}

#[test]
fn what_cannot_be_written_is_refused_before_any_work() {
    let directory = TempDir::new().unwrap();
    let at = |name: &str| directory.path().join(name);
    assert!(check(&at("new.mp4"), &SPEC, false).is_ok());
    fs::write(at("old.mp4"), "old").unwrap();
    let error = check(&at("old.mp4"), &SPEC, false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    assert!(error.hint_text().is_some_and(|hint| hint.contains("-y")));
    assert!(check(&at("old.mp4"), &SPEC, true).is_ok());
    fs::create_dir(at("dir.mp4")).unwrap();
    assert_refused(check(&at("dir.mp4"), &SPEC, true), ErrorKind::Usage, "is a directory");
    assert_refused(check(&at("none/a.mp4"), &SPEC, true), ErrorKind::Io, "none");
    let error = check(&at("none/a.mp4"), &SPEC, true).unwrap_err();
    assert!(error.hint_text().is_some_and(|hint| hint.contains("mkdir")));
    assert_refused(check(&at("old.mp4/a.mp4"), &SPEC, true), ErrorKind::Io, "old.mp4");
    let long = format!("{}.mp4", "n".repeat(300));
    assert_refused(check(&at(&long), &SPEC, true), ErrorKind::Io, "nnn");
    assert_eq!(names(directory.path()), ["dir.mp4", "old.mp4"]);
}

#[cfg(target_os = "linux")]
#[test]
fn devices_pipes_and_read_only_places_are_refused() {
    let directory = TempDir::new().unwrap();
    let pipe = directory.path().join("pipe.y4m");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert_refused(check(&pipe, &SPEC, true), ErrorKind::Usage, "is not a regular file");
    // Nobody can make files there, root included.
    assert_refused(check(Path::new("/proc/a.mp4"), &SPEC, true), ErrorKind::Io, "/proc");
}

#[test]
fn what_a_format_cannot_hold_is_refused() {
    let directory = TempDir::new().unwrap();
    let check = |name: &str, change: fn(&mut VideoSpec)| {
        let mut spec = SPEC;
        change(&mut spec);
        check(&directory.path().join(name), &spec, false).map_err(|e| e.kind())
    };
    let refused = Err(ErrorKind::Usage);
    assert_eq!(check("a.mp4", |s| s.frames = 0), refused);
    assert_eq!(check("a.mp4", |s| s.width = 63), refused);
    assert_eq!(check("a.y4m", |s| s.height = 63), refused);
    assert_eq!(check("a.gif", |s| s.height = 63), Ok(()));
    assert_eq!(check("a.mp4", |s| s.height = 14), refused);
    assert_eq!(check("a.mp4", |s| s.width = 3840), Ok(()));
    assert_eq!(check("a.mp4", |s| s.width = 3842), refused);
    assert_eq!(check("a.mp4", |s| (s.width, s.height) = (2162, 2162)), refused);
    assert_eq!(check("a.gif", |s| s.width = 0), refused);
    assert_eq!(check("a.gif", |s| s.width = 70_000), refused);
    assert_eq!(check("a.mp4", |s| s.fps_num = 0), refused);
    assert_eq!(check("a.mp4", |s| s.fps_den = 0), refused);
    assert_eq!(check("a.mp4", |s| s.fps_num = u32::MAX), refused);
}

#[test]
fn the_smallest_and_odd_rates_are_written() {
    let directory = TempDir::new().unwrap();
    for (name, width, height, fps) in [("a", 16, 16, (24, 1)), ("b", 18, 30, (30_000, 1001))] {
        let path = directory.path().join(name).with_extension("mp4");
        let (fps_num, fps_den) = fps;
        let spec = VideoSpec { width, height, fps_num, fps_den, frames: 2 };
        let mut sink = open(&path, &spec, false).unwrap();
        for index in 0..2 {
            sink.push(&Frame::from_fn(width, height, |x, _| [x as u8, index, 9]).unwrap()).unwrap();
        }
        sink.finish().unwrap();
        let info = pyraflow::media::inspect(&path).unwrap();
        assert_eq!((info.width, info.height, info.frames), (width, height, 2));
        assert_eq!(info.duration, Some(2.0 * f64::from(fps_den) / f64::from(fps_num)));
    }
}

#[test]
fn an_unfinished_video_leaves_nothing() {
    let directory = TempDir::new().unwrap();
    for path in outputs(&directory) {
        let mut sink = open(&path, &SPEC, false).unwrap();
        sink.push(&frame(0)).unwrap();
        drop(sink);
        let mut sink = open(&path, &SPEC, false).unwrap();
        sink.push(&frame(0)).unwrap();
        assert_refused(sink.finish(), ErrorKind::Io, "only 1 of 3 frames");
        assert_eq!(names(directory.path()), [""; 0], "{}", path.display());
    }
}

#[test]
fn frames_must_be_as_announced() {
    let directory = TempDir::new().unwrap();
    for path in outputs(&directory) {
        let mut sink = open(&path, &SPEC, false).unwrap();
        let other = Frame::from_fn(32, 128, |_, _| [0; 3]).unwrap();
        assert_refused(sink.push(&other), ErrorKind::Input, "32x128");
        for index in 0..3 {
            sink.push(&frame(index)).unwrap();
        }
        assert_refused(sink.push(&frame(3)), ErrorKind::Input, "more frames than the 3");
    }
}

#[test]
fn overwriting_needs_permission_and_replaces_at_the_end() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("a.mp4");
    fs::write(&path, "old").unwrap();
    assert_refused(write(&path, false), ErrorKind::Usage, "exists already");
    let mut sink = open(&path, &SPEC, true).unwrap();
    (0..3).for_each(|index| sink.push(&frame(index)).unwrap());
    assert_eq!(fs::read_to_string(&path).unwrap(), "old");
    sink.finish().unwrap();
    assert!(fs::read(&path).unwrap().len() > 1000);
    assert_eq!(names(directory.path()), ["a.mp4"]);
    // A file that appears while the video is made is not replaced either.
    let path = directory.path().join("b.mp4");
    let mut sink = open(&path, &SPEC, false).unwrap();
    (0..3).for_each(|index| sink.push(&frame(index)).unwrap());
    fs::write(&path, "other").unwrap();
    assert_refused(sink.finish(), ErrorKind::Usage, "exists already");
    assert_eq!(fs::read_to_string(&path).unwrap(), "other");
    assert_eq!(names(directory.path()), ["a.mp4", "b.mp4"]);
}

#[test]
fn several_png_frames_are_numbered_files_without_loss() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("a.png");
    write(&path, false).unwrap();
    assert_eq!(names(directory.path()), ["a-00000.png", "a-00001.png", "a-00002.png"]);
    for index in 0..3 {
        let written = directory.path().join(format!("a-{index:05}.png"));
        assert_eq!(load_image(&written, 64, 64, Fit::Stretch).unwrap(), frame(index));
    }
    assert_refused(write(&path, false), ErrorKind::Usage, "a-0000");
    write(&path, true).unwrap();
    // A shorter video would leave the end of the longer one behind.
    let shorter = VideoSpec { frames: 2, ..SPEC };
    assert_refused(check(&path, &shorter, true), ErrorKind::Usage, "a-00002.png is left");
    // One frame is one file.
    let mut sink = open(&path, &VideoSpec { frames: 1, ..SPEC }, false).unwrap();
    sink.push(&frame(0)).unwrap();
    sink.finish().unwrap();
    assert_eq!(load_image(&path, 64, 64, Fit::Stretch).unwrap(), frame(0));
}

#[test]
fn y4m_is_a_header_and_planes() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("a.y4m");
    let white = Frame::from_fn(64, 64, |_, _| [255; 3]).unwrap();
    let mut sink = open(&path, &SPEC, false).unwrap();
    (0..3).for_each(|_| sink.push(&white).unwrap());
    sink.finish().unwrap();
    let mut want = b"YUV4MPEG2 W64 H64 F24:1 Ip A1:1 C420jpeg XCOLORRANGE=LIMITED\n".to_vec();
    let picture = [&b"FRAME\n"[..], &[235; 64 * 64], &[128; 32 * 32 * 2]].concat();
    want.extend(picture.repeat(3));
    assert_eq!(fs::read(&path).unwrap(), want);
}

#[cfg(unix)]
#[test]
fn files_have_the_usual_permissions_and_links_stay_links() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let directory = TempDir::new().unwrap();
    let usual = directory.path().join("usual");
    fs::write(&usual, "").unwrap();
    let (real, link) = (directory.path().join("real.gif"), directory.path().join("link.gif"));
    symlink(&real, &link).unwrap();
    assert_refused(check(&link, &SPEC, true), ErrorKind::Io, "link.gif");
    fs::write(&real, "old").unwrap();
    write(&link, true).unwrap();
    assert!(link.is_symlink() && !real.is_symlink());
    assert!(fs::read(&real).unwrap().starts_with(b"GIF89a"));
    let mode = |path| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&real), mode(&usual));
}

/// The other half of [`a_disk_that_fills_up_leaves_nothing_but_an_error`], in a process that
/// may not write large files.
#[test]
fn child_that_may_not_write_large_files() {
    let Some(path) = std::env::var_os("PYRAFLOW_TEST_LIMITED_OUTPUT") else { return };
    let spec = VideoSpec { frames: 100, ..SPEC };
    let result = open(Path::new(&path), &spec, true).and_then(|mut sink| {
        (0..spec.frames).try_for_each(|index| sink.push(&frame(index)))?;
        sink.finish()
    });
    let error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    let stem = Path::new(&path).with_extension("");
    assert!(error.to_string().contains(stem.to_str().unwrap()), "{error}");
    assert!(error.hint_text().is_some_and(|hint| hint.contains("free some space")));
}

#[cfg(unix)]
#[test]
fn a_disk_that_fills_up_leaves_nothing_but_an_error() {
    let directory = TempDir::new().unwrap();
    for path in outputs(&directory) {
        let old = path.extension() != Some("png".as_ref());
        if old {
            fs::write(&path, "old").unwrap();
        }
        // Files may have 8 blocks; the signal at the limit is ignored, so that it is an error.
        let script =
            "trap '' XFSZ; ulimit -f 8; exec \"$0\" --exact child_that_may_not_write_large_files";
        let child = Command::new("sh")
            .args(["-c", script])
            .arg(std::env::current_exe().unwrap())
            .env("PYRAFLOW_TEST_LIMITED_OUTPUT", &path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout).into_owned();
        assert!(child.status.success() && said.contains("1 passed"), "{said}");
        if old {
            assert_eq!(fs::read_to_string(&path).unwrap(), "old");
            fs::remove_file(&path).unwrap();
        }
        assert_eq!(names(directory.path()), [""; 0], "{}", path.display());
    }
}
