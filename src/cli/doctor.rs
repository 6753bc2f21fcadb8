//! `pyraflow doctor`.

use pyraflow::Result;
use pyraflow::exec::cuda::images::{IMAGES, NVCC_VERSION, targets};
use pyraflow::exec::cuda::probe::{self, GpuInfo, Problem, Report};
use pyraflow::exec::{available_memory, total_memory};
use serde::Serialize;

/// Arguments of `doctor`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Everything that is reported.
#[derive(Debug, Serialize)]
struct Health {
    /// The version of pyraflow.
    version: &'static str,
    /// The GPU kernels in it.
    kernels: Kernels,
    /// What was found of NVIDIA's.
    #[serde(flatten)]
    found: Report,
    cublaslt: Library,
    cpu: Cpu,
    /// The number of the GPU that `--device cuda` takes, if there is one.
    gpu: Option<usize>,
}

#[derive(Debug, Serialize)]
struct Kernels {
    nvcc: Option<&'static str>,
    targets: Vec<String>,
}

/// A library that is used where it is installed, and not needed.
#[derive(Debug, Serialize)]
struct Library {
    version: Option<String>,
    hint: Option<&'static str>,
}

/// The machine itself; memory in bytes.
#[derive(Debug, Serialize)]
struct Cpu {
    threads: Option<usize>,
    memory_total: Option<u64>,
    memory_available: Option<u64>,
}

/// Reports; what is wrong with the machine is no failure of this command.
pub fn run(args: &Args) -> Result<()> {
    let found = probe::probe();
    let version = probe::cublaslt();
    let health = Health {
        version: env!("CARGO_PKG_VERSION"),
        kernels: Kernels { nvcc: NVCC_VERSION, targets: targets(IMAGES) },
        gpu: found.require(None).ok().map(|gpu| gpu.index),
        cublaslt: Library {
            hint: version.is_none().then_some(
                "optional, makes linear layers faster: install it with CUDA, \
                 or by pip install nvidia-cublas, and put the folder of libcublasLt.so.13 into \
                 LD_LIBRARY_PATH",
            ),
            version,
        },
        cpu: Cpu {
            threads: std::thread::available_parallelism().ok().map(usize::from),
            memory_total: total_memory(),
            memory_available: available_memory(),
        },
        found,
    };
    super::print(&if args.json {
        format!("{:#}\n", serde_json::json!(health))
    } else {
        table(&health)
    })
}

fn table(health: &Health) -> String {
    let Health { version, kernels, found, cublaslt, cpu, gpu } = health;
    let mut text = line("pyraflow", version);
    text += &line(
        "kernels",
        &match kernels.nvcc {
            Some(nvcc) => format!("for {} (nvcc {nvcc})", kernels.targets.join(", ")),
            None => "none in this build".to_string(),
        },
    );
    text += &line(
        "driver",
        &match &found.driver {
            Some(driver) => {
                let version = driver.version.as_deref().unwrap_or("of unknown version");
                format!("NVIDIA {version}, CUDA {}", driver.cuda)
            }
            None => "none".to_string(),
        },
    );
    for gpu in &found.gpus {
        text += &line(&format!("cuda:{}", gpu.index), &describe(gpu));
        text += &gpu.problem.as_ref().map_or(String::new(), problem);
    }
    text += &line("cuBLASLt", cublaslt.version.as_deref().unwrap_or("not found"));
    text += &cublaslt.hint.map_or(String::new(), |hint| line("", hint));
    let threads = cpu.threads.map_or("unknown".to_string(), |threads| threads.to_string());
    text += &line("CPU", &format!("{threads} threads"));
    text += &line("memory", &memory(cpu.memory_available, cpu.memory_total));
    text += &found.problem.as_ref().map_or(String::new(), problem);
    let device = gpu.map_or("cpu".to_string(), |index| format!("cuda:{index}"));
    text + &line("best", &format!("--device {device}"))
}

fn line(name: &str, text: &str) -> String {
    format!("{name:<10}{text}\n")
}

fn describe(gpu: &GpuInfo) -> String {
    let images = match gpu.images.as_slice() {
        [] => "no kernels run on it".to_string(),
        images => format!("runs {}", images.join(", ")),
    };
    format!(
        "{}, compute capability {}, {}; {images}",
        gpu.name,
        gpu.compute_capability,
        memory(gpu.memory_free, Some(gpu.memory_total)),
    )
}

fn memory(free: Option<u64>, total: Option<u64>) -> String {
    let gib = |bytes: Option<u64>| {
        let known = |bytes| format!("{:.1}", bytes as f64 / f64::from(1 << 30));
        bytes.map_or("?".to_string(), known)
    };
    format!("{} of {} GiB free", gib(free), gib(total))
}

fn problem(problem: &Problem) -> String {
    line("problem", &problem.problem) + &line("", &format!("hint: {}", problem.hint))
}
