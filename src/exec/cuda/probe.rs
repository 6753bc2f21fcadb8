//! What the machine has: an NVIDIA driver, GPUs, cuBLASLt; and whether this program can use
//! it. Nothing here needs any of them to be there: the libraries are looked for first, and
//! everything that is wrong is told in a sentence with what to do about it.

use std::ffi::CStr;
use std::fmt;

use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};
use serde::{Serialize, Serializer};

use super::images::{self, IMAGES, Image, NVCC_VERSION};
use crate::{Error, Result};

/// Two numbers that are written with a dot: a compute capability, a version of CUDA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u32, pub u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

impl Serialize for Version {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A reason why something cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// What is wrong.
    pub problem: String,
    /// What to do about it.
    pub hint: String,
}

impl Problem {
    fn new(problem: impl Into<String>, hint: impl Into<String>) -> Problem {
        Problem { problem: problem.into(), hint: hint.into() }
    }
}

impl From<Problem> for Error {
    fn from(problem: Problem) -> Error {
        Error::device(problem.problem).hint(problem.hint)
    }
}

/// NVIDIA's driver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Driver {
    /// Its own version, such as 580.95.05, where the system tells it.
    pub version: Option<String>,
    /// The newest version of CUDA that it runs.
    pub cuda: Version,
}

/// A GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GpuInfo {
    /// Its number among those that the driver shows: the N of `cuda:N`.
    pub index: usize,
    /// What the driver calls it.
    pub name: String,
    /// What its instructions are.
    pub compute_capability: Version,
    /// Memory in bytes.
    pub memory_total: u64,
    /// Memory that nothing uses, in bytes; only [`probe`] asks for it, since that takes a while.
    pub memory_free: Option<u64>,
    /// Which of this program's images run on it, as `sm_86` or `compute_80`, best first.
    pub images: Vec<String>,
    /// Why it cannot be used.
    pub problem: Option<Problem>,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The driver, if there is one.
    pub driver: Option<Driver>,
    /// Its GPUs.
    pub gpus: Vec<GpuInfo>,
    /// Why no GPU can be used, if that is so for a common reason.
    pub problem: Option<Problem>,
}

impl Report {
    /// The GPU of this number, or the first that can be used.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Device`] with what to do, if it cannot be used or is not there.
    pub fn require(&self, index: Option<usize>) -> Result<GpuInfo> {
        if let Some(problem) = &self.problem {
            return Err(problem.clone().into());
        }
        let found = match index {
            Some(index) => self.gpus.iter().find(|gpu| gpu.index == index),
            None => self.gpus.iter().find(|g| g.problem.is_none()).or(self.gpus.first()),
        };
        match found {
            Some(GpuInfo { problem: Some(problem), .. }) => Err(problem.clone().into()),
            Some(gpu) => Ok(gpu.clone()),
            None => Err(self.not_there(index.unwrap_or(0)).into()),
        }
    }

    fn not_there(&self, index: usize) -> Problem {
        let names: Vec<String> =
            self.gpus.iter().map(|gpu| format!("cuda:{} ({})", gpu.index, gpu.name)).collect();
        Problem::new(
            format!("there is no GPU {index}"),
            format!(
                "the driver shows {}; CUDA_VISIBLE_DEVICES decides which it shows",
                names.join(", ")
            ),
        )
    }
}

/// The GPU of this number, or the first that this program can use; how much of its memory is
/// free is not asked.
///
/// # Errors
/// [`crate::ErrorKind::Device`] with what to do: there is no driver, it is too old or shows no
/// GPU, or this program holds no kernels for the GPU.
pub fn require(index: Option<usize>) -> Result<GpuInfo> {
    look(false).require(index)
}

/// Everything that there is to know.
pub fn probe() -> Report {
    look(true)
}

fn look(free_memory: bool) -> Report {
    let mut report = Report { driver: None, gpus: Vec::new(), problem: None };
    if let Err(problem) = fill(&mut report, free_memory) {
        report.problem = Some(problem);
    }
    report
}

/// Fills the report until something is in the way.
fn fill(report: &mut Report, free_memory: bool) -> Result<(), Problem> {
    let version = kernel_module();
    // SAFETY: loads the driver's library, or finds that it is not there.
    if !unsafe { sys::is_culib_present() } {
        return Err(no_driver(version.as_deref()));
    }
    // The newest of the functions used here; what is not there would panic when called.
    // SAFETY: only whether the symbol is there is looked at.
    let symbol = unsafe { sys::culib().get::<fn()>(b"cuLaunchKernelEx\0") };
    if symbol.is_err() {
        return Err(too_old(version.as_deref(), "its library lacks functions of CUDA 11.8"));
    }
    let mut cuda = 0;
    // SAFETY: writes one number; may be called before `cuInit`.
    check(unsafe { sys::cuDriverGetVersion(&raw mut cuda) })
        .map_err(|code| failed("its version cannot be had", code))?;
    let cuda = cuda.unsigned_abs();
    let cuda = Version(cuda / 1000, cuda % 1000 / 10);
    report.driver = Some(Driver { version, cuda });
    let common = whole_build(NVCC_VERSION, cuda);

    // SAFETY: may be called at any time, any number of times.
    check(unsafe { sys::cuInit(0) }).map_err(|code| no_gpu(code, visible_devices()))?;
    let mut count = 0;
    // SAFETY: writes one number.
    check(unsafe { sys::cuDeviceGetCount(&raw mut count) })
        .map_err(|code| failed("GPUs cannot be counted", code))?;
    if count == 0 {
        return Err(no_gpu(CUresult::CUDA_ERROR_NO_DEVICE, visible_devices()));
    }
    for ordinal in 0..count {
        let gpu = describe(ordinal, cuda, free_memory)
            .map_err(|code| failed(&format!("GPU {ordinal} cannot be described"), code))?;
        report.gpus.push(gpu);
    }
    common.map_or(Ok(()), Err)
}

fn check(code: CUresult) -> Result<(), CUresult> {
    if code == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(code) }
}

fn describe(ordinal: i32, driver: Version, free_memory: bool) -> Result<GpuInfo, CUresult> {
    let (mut device, mut total, mut name) = (0, 0, [0; 256]);
    // SAFETY: the driver is initialised, writes one value each, and ends the name with a zero
    // within its length.
    let (name, capability, prohibited) = unsafe {
        check(sys::cuDeviceGet(&raw mut device, ordinal))?;
        check(sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device))?;
        check(sys::cuDeviceTotalMem_v2(&raw mut total, device))?;
        use CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_MODE as MODE,
        };
        let capability = Version(attribute(MAJOR, device)?, attribute(MINOR, device)?);
        let name = CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned();
        // The value of CU_COMPUTEMODE_PROHIBITED.
        (name, capability, attribute(MODE, device)? == 2)
    };
    let (images, mut problem) = judge(IMAGES, NVCC_VERSION, capability, driver);
    if prohibited {
        problem = Some(Problem::new(
            "computing on this GPU is prohibited",
            format!("allow it with: nvidia-smi -i {ordinal} -c DEFAULT"),
        ));
    }
    let mut memory_free = None;
    if free_memory && !prohibited {
        match free(device) {
            Ok(bytes) => memory_free = Some(bytes as u64),
            Err(code) => {
                let said = failed("this GPU cannot be used", code);
                problem = problem.or(Some(said));
            }
        }
    }
    let (index, memory_total) = (ordinal.unsigned_abs() as usize, total as u64);
    let compute_capability = capability;
    Ok(GpuInfo { index, name, compute_capability, memory_total, memory_free, images, problem })
}

/// # Safety
/// `device` must be one of the driver's.
unsafe fn attribute(which: CUdevice_attribute, device: i32) -> Result<u32, CUresult> {
    let mut value = 0;
    // SAFETY: writes one number.
    check(unsafe { sys::cuDeviceGetAttribute(&raw mut value, which, device) })?;
    Ok(value.unsigned_abs())
}

/// Bytes of memory that nothing uses. Only a context can be asked, and to make one takes a
/// part of a second and some of that memory.
fn free(device: i32) -> Result<usize, CUresult> {
    let (mut context, mut free, mut total) = (std::ptr::null_mut(), 0, 0);
    // SAFETY: the context is released below, and is not current any more by then.
    unsafe {
        check(sys::cuDevicePrimaryCtxRetain(&raw mut context, device))?;
        let mut asked = check(sys::cuCtxPushCurrent_v2(context));
        if asked.is_ok() {
            asked = check(sys::cuMemGetInfo_v2(&raw mut free, &raw mut total));
            let _ = sys::cuCtxPopCurrent_v2(&raw mut context);
        }
        let _ = sys::cuDevicePrimaryCtxRelease_v2(device);
        asked.map(|()| free)
    }
}

/// The version of cuBLASLt, if the library is there and can be used.
pub fn cublaslt() -> Option<String> {
    let version = super::cublaslt::version()?;
    Some(format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
}

/// The version of the driver's kernel module.
fn kernel_module() -> Option<String> {
    let file = |path: &str| std::fs::read_to_string(path).ok();
    file("/sys/module/nvidia/version")
        .map(|text| text.trim().to_string())
        .filter(|version| !version.is_empty())
        .or_else(|| module_version(&file("/proc/driver/nvidia/version")?))
}

/// The version in the first line of `/proc/driver/nvidia/version`, after other words.
fn module_version(text: &str) -> Option<String> {
    let numbers =
        |word: &str| word.contains('.') && !word.contains(|c: char| !"0123456789.".contains(c));
    text.lines().next()?.split_whitespace().find(|word| numbers(word)).map(String::from)
}

fn visible_devices() -> Option<String> {
    std::env::var_os("CUDA_VISIBLE_DEVICES").map(|value| value.to_string_lossy().into_owned())
}

fn no_driver(module: Option<&str>) -> Problem {
    match module {
        None => Problem::new(
            "no NVIDIA driver was found",
            "install NVIDIA's driver (its library is libcuda.so.1), or use --device cpu",
        ),
        Some(version) => Problem::new(
            format!("the NVIDIA driver {version} is there, but its library libcuda.so.1 is not"),
            "in a container, start it with access to GPUs (docker run --gpus all); else install \
             the library of the same version, or use --device cpu",
        ),
    }
}

fn too_old(version: Option<&str>, why: &str) -> Problem {
    let version = version.map_or(String::new(), |version| format!(" {version}"));
    Problem::new(
        format!("the NVIDIA driver{version} is too old: {why}"),
        "install a newer driver, or use --device cpu",
    )
}

fn failed(what: &str, code: CUresult) -> Problem {
    use CUresult::*;
    let hint = match code {
        CUDA_ERROR_DEVICE_UNAVAILABLE => {
            "another process has the GPU for itself; wait for it to end"
        }
        CUDA_ERROR_OUT_OF_MEMORY => "its memory is full; end what uses it, or use --device cpu",
        CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            "the driver's library and its kernel module differ; restart the machine after an update"
        }
        CUDA_ERROR_SYSTEM_NOT_READY => "start nvidia-fabricmanager, or wait until it is ready",
        _ => "see whether nvidia-smi works and what dmesg says, or use --device cpu",
    };
    Problem::new(format!("{what}: the NVIDIA driver reports {code:?}"), hint)
}

/// Why the driver did not start, or shows nothing.
fn no_gpu(code: CUresult, visible: Option<String>) -> Problem {
    use CUresult::*;
    match (code, visible) {
        (CUDA_ERROR_NO_DEVICE | CUDA_ERROR_INVALID_DEVICE, Some(list)) => Problem::new(
            format!("CUDA_VISIBLE_DEVICES={list:?} hides all GPUs"),
            "unset it, or list the numbers of the GPUs to use; nvidia-smi -L shows them",
        ),
        (CUDA_ERROR_NO_DEVICE, None) => Problem::new(
            "the NVIDIA driver finds no GPU",
            "see whether nvidia-smi -L lists one; in a container, start it with access to GPUs; \
             else use --device cpu",
        ),
        (CUDA_ERROR_STUB_LIBRARY, _) => Problem::new(
            "the libcuda.so that was found is a stub for linking",
            "take its folder out of LD_LIBRARY_PATH",
        ),
        (code, _) => failed("CUDA cannot start", code),
    }
}

/// The first two numbers of a version.
fn numbers(version: &str) -> Option<Version> {
    let mut parts = version.split('.').map(str::parse);
    Some(Version(parts.next()?.ok()?, parts.next()?.ok()?))
}

/// What is wrong with this program or its driver whatever the GPU.
fn whole_build(nvcc: Option<&str>, driver: Version) -> Option<Problem> {
    let Some(nvcc) = nvcc.and_then(numbers) else {
        return Some(Problem::new(
            "this pyraflow was built without GPU kernels",
            "run tools/install-nvcc in its source and build it again, or use --device cpu",
        ));
    };
    // Machine code needs a driver of the same major version at least.
    let needed = Version(nvcc.0, 0);
    (driver < needed)
        .then(|| too_old(None, &format!("it runs CUDA {driver}, and the kernels need {needed}")))
}

/// Which images run on a GPU, and why they do not suffice.
fn judge(
    images: &[Image],
    nvcc: Option<&str>,
    capability: Version,
    driver: Version,
) -> (Vec<String>, Option<Problem>) {
    let Version(major, minor) = capability;
    let chosen = images::choose(images, (major, minor));
    let targets = images::targets(&chosen);
    let missing = images::missing(images, (major, minor));
    let build =
        format!("build pyraflow with PYRAFLOW_CUDA_ARCHS={major}{minor}, or use --device cpu");
    let problem = if capability < Version(8, 0) {
        Some(Problem::new(
            format!("this GPU has compute capability {capability}, and the kernels need 8.0"),
            "use a GPU of the Ampere generation or newer, or --device cpu",
        ))
    } else if let Some(file) = missing.first() {
        Some(Problem::new(
            format!(
                "this pyraflow has kernels for {}, and none of {file} for a GPU of compute \
                 capability {capability}",
                images::targets(images).join(", ")
            ),
            build,
        ))
    } else {
        // PTX is compiled by the driver, which must know as much as the nvcc that wrote it.
        let nvcc = nvcc.and_then(numbers).filter(|nvcc| driver < *nvcc);
        nvcc.filter(|_| chosen.iter().any(|image| image.ptx)).map(|nvcc| {
            let why = format!("it runs CUDA {driver}, and to compile the kernels needs {nvcc}");
            let Problem { problem, hint } = too_old(None, &why);
            Problem::new(problem, format!("{hint}, or {build}"))
        })
    };
    (targets, problem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    const DRIVER: Version = Version(13, 0);
    const NVCC: Option<&str> = Some("13.0.88");

    fn images() -> Vec<Image> {
        let mut images = Vec::new();
        for (arch, ptx) in [("80", true), ("80", false), ("90a", false)] {
            images.push(Image { file: "norm", arch, ptx, bytes: &[] });
        }
        images.push(Image { file: "linear_sm90", arch: "90a", ptx: false, bytes: &[] });
        images
    }

    fn gpu(index: usize, problem: Option<Problem>) -> GpuInfo {
        GpuInfo {
            index,
            name: format!("GPU {index}"),
            compute_capability: Version(9, 0),
            memory_total: 80 << 30,
            memory_free: None,
            images: vec!["sm_90a".into()],
            problem,
        }
    }

    fn report(gpus: Vec<GpuInfo>) -> Report {
        Report { driver: Some(Driver { version: None, cuda: DRIVER }), gpus, problem: None }
    }

    #[track_caller]
    fn refused(report: &Report, index: Option<usize>, message: &str, hint: &str) {
        let error = report.require(index).expect_err("no GPU");
        assert_eq!(error.kind(), ErrorKind::Device);
        assert!(error.to_string().contains(message), "{error}");
        assert!(error.hint_text().is_some_and(|h| h.contains(hint)), "{error:?}");
    }

    #[test]
    fn the_first_usable_gpu_is_taken() {
        let old = Problem::new("too old", "buy another");
        let two = report(vec![gpu(0, Some(old.clone())), gpu(1, None)]);
        assert_eq!(two.require(None).map(|gpu| gpu.index).ok(), Some(1));
        assert_eq!(two.require(Some(1)).map(|gpu| gpu.index).ok(), Some(1));
        refused(&two, Some(0), "too old", "buy another");
        refused(&two, Some(2), "no GPU 2", "cuda:0 (GPU 0), cuda:1 (GPU 1)");
        refused(&report(vec![gpu(0, Some(old.clone()))]), None, "too old", "buy another");
        let none = Report { problem: Some(old), ..report(vec![gpu(0, None)]) };
        refused(&none, None, "too old", "buy another");
    }

    #[test]
    fn gpus_are_judged_by_what_was_built() {
        let images = images();
        let judged = |capability, driver| judge(&images, NVCC, capability, driver);
        assert_eq!(judged(Version(9, 0), DRIVER), (vec!["sm_90a".to_string()], None));
        assert_eq!(judged(Version(8, 6), DRIVER), (vec!["sm_80".to_string()], None));
        assert_eq!(judged(Version(12, 0), Version(13, 1)), (vec!["compute_80".to_string()], None));

        let (targets, problem) = judged(Version(7, 5), DRIVER);
        assert!(targets.is_empty());
        assert!(problem.is_some_and(|p| p.problem.contains("7.5") && p.hint.contains("Ampere")));
        let newer = judge(&images, Some("13.1.2"), Version(12, 0), DRIVER).1.expect("a problem");
        assert!(newer.problem.contains("CUDA 13.0") && newer.problem.contains("13.1"), "{newer:?}");
        assert!(newer.hint.contains("PYRAFLOW_CUDA_ARCHS=120"), "{newer:?}");
        assert_eq!(judge(&images, Some("13.1.2"), Version(8, 6), DRIVER).1, None);
        let none = judge(&images[2..], NVCC, Version(8, 9), DRIVER).1.expect("a problem");
        assert!(none.problem.contains("sm_90a, and none of norm"), "{none:?}");
    }

    #[test]
    fn builds_without_kernels_and_old_drivers_are_told_apart() {
        let none = whole_build(None, DRIVER).expect("a problem");
        assert!(none.hint.contains("tools/install-nvcc"), "{none:?}");
        assert_eq!(whole_build(NVCC, DRIVER), None);
        assert_eq!(whole_build(Some("12.8.93"), DRIVER), None);
        let old = whole_build(NVCC, Version(12, 8)).expect("a problem");
        assert!(old.problem.contains("CUDA 12.8") && old.problem.contains("13.0"), "{old:?}");
    }

    #[test]
    fn what_hides_gpus_is_named() {
        let hidden = no_gpu(CUresult::CUDA_ERROR_NO_DEVICE, Some(String::new()));
        assert!(hidden.problem.contains("CUDA_VISIBLE_DEVICES=\"\""), "{hidden:?}");
        let none = no_gpu(CUresult::CUDA_ERROR_NO_DEVICE, None);
        assert!(none.problem.contains("finds no GPU"), "{none:?}");
        let other = no_gpu(CUresult::CUDA_ERROR_SYSTEM_NOT_READY, None);
        assert!(other.hint.contains("fabricmanager"), "{other:?}");
    }

    #[test]
    fn the_kernel_module_tells_its_version() {
        for text in [
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27\nGCC 9.3.0",
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  470.82.01  Release Build",
        ] {
            assert_eq!(module_version(text).as_deref(), Some("470.82.01"));
        }
        assert_eq!(module_version("GCC"), None);
        assert_eq!(module_version(""), None);
    }

    #[test]
    fn probing_never_panics() {
        let report = probe();
        assert!(report.problem.is_some() || !report.gpus.is_empty());
        assert!(report.driver.is_some() || report.problem.is_some());
        assert_eq!(require(None).is_ok(), report.require(None).is_ok());
        let _ = cublaslt();
    }
}
