//! The kernels in this program: machine code and PTX that the build script made with nvcc
//! from `kernels/*.cu`. Built without nvcc the list is empty.

#[allow(dead_code, reason = "only the build script reads lists")]
#[path = "../../../build/archs.rs"]
mod archs;

pub use archs::Arch;

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// One kernel file compiled for one architecture.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Image {
    /// The file's name without its extension. One that ends in `_sm90` is a variant for this
    /// architecture, and there is no need to have it.
    pub file: &'static str,
    /// `80`, `90a` and so on.
    pub arch: &'static str,
    /// PTX, with a zero at its end, instead of machine code.
    pub ptx: bool,
    /// What the driver loads.
    pub bytes: &'static [u8],
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = if self.ptx { "compute" } else { "sm" };
        write!(f, "{} for {kind}_{} ({} bytes)", self.file, self.arch, self.bytes.len())
    }
}

/// Machine code is an ELF file, whose headers want to be aligned.
#[repr(C, align(16))]
#[allow(dead_code, reason = "there may be no images")]
struct Aligned<T>(T);

impl Image {
    /// What this was compiled for, unless `arch` is no architecture.
    pub fn compiled_for(&self) -> Option<Arch> {
        Some(Arch { ptx: self.ptx, ..Arch::parse(self.arch).ok()? })
    }

    /// Whether this is a variant for one architecture that others do without.
    pub fn optional(&self) -> bool {
        self.file.ends_with("_sm90")
    }

    /// How well this suits a GPU: the more the better, `None` if it does not run there.
    fn rank(&self, (major, minor): (u32, u32)) -> Option<(bool, bool, u32)> {
        let arch = self.compiled_for()?;
        let capability = 10 * major + minor;
        let runs = match (arch.accelerated, arch.ptx) {
            (true, _) => arch.number == capability,
            // Machine code runs on later GPUs of the same generation.
            (false, false) => arch.number / 10 == major && arch.number <= capability,
            (false, true) => arch.number <= capability,
        };
        runs.then_some((!arch.ptx, arch.accelerated, arch.number))
    }
}

/// The images to load on a GPU of this compute capability, one of each file that has one that
/// runs there: machine code for this very GPU, else for an earlier one of its generation, else
/// PTX.
pub fn choose(images: &[Image], capability: (u32, u32)) -> Vec<Image> {
    let mut chosen: Vec<Image> = Vec::new();
    for image in images.iter().filter(|image| image.rank(capability).is_some()) {
        match chosen.iter_mut().find(|other| other.file == image.file) {
            Some(other) if image.rank(capability) > other.rank(capability) => *other = *image,
            Some(_) => {}
            None => chosen.push(*image),
        }
    }
    chosen
}

/// The files without which nothing works, and of which no image runs on a GPU of this compute
/// capability.
pub fn missing(images: &[Image], capability: (u32, u32)) -> Vec<&'static str> {
    let chosen = choose(images, capability);
    let mut files: Vec<&str> = images.iter().filter(|i| !i.optional()).map(|i| i.file).collect();
    files.retain(|file| !chosen.iter().any(|image| image.file == *file));
    files.dedup();
    files
}

/// What `images` were compiled for, in nvcc's words: machine code, then PTX.
pub fn targets(images: &[Image]) -> Vec<String> {
    let mut archs: Vec<Arch> = images.iter().filter_map(|image| image.compiled_for()).collect();
    archs.sort_by_key(|arch| (arch.ptx, *arch));
    archs.dedup();
    archs.iter().map(Arch::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(file: &'static str, target: &'static str) -> Image {
        let ptx = target.starts_with("compute_");
        let arch = target.rsplit('_').next().unwrap_or(target);
        Image { file, arch, ptx, bytes: &[] }
    }

    /// Two files for everything there is by default, in no order, and one for Hopper.
    fn images() -> Vec<Image> {
        let all = ["sm_86", "compute_80", "sm_90a", "sm_80", "sm_120", "sm_89"];
        let mut images: Vec<Image> = all.map(|target| image("norm", target)).to_vec();
        images.extend(all.map(|target| image("linear", target)));
        images.push(image("linear_sm90", "sm_90a"));
        images
    }

    fn chosen(images: &[Image], capability: (u32, u32)) -> Vec<(&'static str, String)> {
        let target = |image: &Image| image.compiled_for().expect("an architecture").to_string();
        choose(images, capability).iter().map(|image| (image.file, target(image))).collect()
    }

    #[test]
    fn the_best_image_of_each_file_is_chosen() {
        for (capability, target) in [
            ((8, 0), "sm_80"),
            ((8, 6), "sm_86"),
            ((8, 7), "sm_86"),
            ((8, 9), "sm_89"),
            ((12, 0), "sm_120"),
            ((12, 1), "sm_120"),
            ((10, 0), "compute_80"),
            ((13, 0), "compute_80"),
        ] {
            let expected = ["norm", "linear"].map(|file| (file, target.to_string()));
            assert_eq!(chosen(&images(), capability), expected, "{capability:?}");
            assert!(missing(&images(), capability).is_empty());
        }
        let hopper = ["norm", "linear", "linear_sm90"].map(|file| (file, "sm_90a".to_string()));
        assert_eq!(chosen(&images(), (9, 0)), hopper);
    }

    #[test]
    fn accelerated_code_runs_on_its_own_architecture_only() {
        let images = [image("norm", "sm_90a"), image("norm", "sm_90"), image("norm", "sm_100a")];
        assert_eq!(chosen(&images, (9, 0)), [("norm", "sm_90a".to_string())]);
        assert_eq!(chosen(&images[1..], (9, 0)), [("norm", "sm_90".to_string())]);
        assert_eq!(chosen(&images, (10, 0)), [("norm", "sm_100a".to_string())]);
        assert_eq!(chosen(&images, (10, 3)), []);
    }

    #[test]
    fn of_ptx_the_newest_that_runs_is_chosen() {
        let images = ["compute_80", "compute_90", "compute_120"].map(|t| image("norm", t));
        assert_eq!(chosen(&images, (10, 0)), [("norm", "compute_90".to_string())]);
        assert_eq!(chosen(&images, (8, 9)), [("norm", "compute_80".to_string())]);
    }

    #[test]
    fn what_cannot_run_is_missing() {
        assert_eq!(missing(&images(), (7, 5)), ["norm", "linear"]);
        assert!(choose(&images(), (7, 5)).is_empty());
        let images = [image("norm", "sm_80"), image("linear", "sm_86"), image("linear", "sm_89")];
        assert_eq!(missing(&images, (8, 0)), ["linear"]);
        assert_eq!(missing(&[], (9, 0)), [""; 0]);
    }

    #[test]
    fn targets_are_listed_once() {
        let all = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_120", "compute_80"];
        assert_eq!(targets(&images()), all);
        assert_eq!(targets(&[]), [""; 0]);
    }

    /// Whatever this build holds is what its list says.
    #[test]
    fn built_images_are_whole() {
        assert!(NVCC_VERSION.is_some() || IMAGES.is_empty());
        for image in IMAGES {
            assert!(Arch::parse(image.arch).is_ok(), "{image:?}");
            assert_eq!(image.bytes.as_ptr() as usize % 16, 0, "{image:?}");
            if image.ptx {
                assert_eq!(image.bytes.last(), Some(&0), "{image:?}");
                assert!(!image.bytes[..image.bytes.len() - 1].contains(&0), "{image:?}");
            } else {
                assert!(image.bytes.starts_with(b"\x7fELF"), "{image:?}");
            }
        }
    }
}
