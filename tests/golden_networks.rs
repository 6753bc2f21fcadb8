//! Single calls of the transformers and of the VAE against tensors measured from the
//! published implementation.

mod common;

use common::golden::{Golden, check, relative_error};
use common::goldens;
use common::networks::{Comparison, transformer_calls, vae_calls};
use pyraflow::exec::{Backend, Cpu};
use pyraflow::tensor::DType;

/// Relative error allowed for a single call.
const SINGLE_CALL: f64 = 1e-5;

/// Rounding to bf16 must show, and must not do more harm than a few roundings in a row:
/// each costs up to 2⁻⁹ of a value.
fn check_bf16(Comparison { what, found, golden }: &Comparison) {
    const ROUNDING: f64 = 1.0 / 512.0;
    let error = relative_error(found, golden);
    println!("{what} in bf16: relative error {error:.2e}");
    assert!(error > ROUNDING / 16.0 && error < ROUNDING * 16.0, "{what} in bf16: {error:e}");
}

#[test]
fn transformers_agree_with_the_published_ones() {
    for family in ["sd3", "flux"] {
        let folder = goldens().join(family);
        let Some(golden) = Golden::open(&folder.join("transformer.safetensors")) else {
            println!("skipped: {} holds no transformer golden", folder.display());
            continue;
        };
        // Once as it is, once with freed memory poisoned, where a use after the end of a
        // tensor's planned life would show, and once as a device stores it.
        for backend in [Cpu::new(), Cpu::new().poisoning(), Cpu::rounding_to_bf16()] {
            for call in transformer_calls(&folder, &golden, &backend) {
                match backend.activations() {
                    DType::F32 => check(&call.what, &call.found, &call.golden, SINGLE_CALL),
                    _ => check_bf16(&call),
                }
            }
        }
    }
}

#[test]
fn vae_agrees_with_the_published_one() {
    match vae_calls(&Cpu::new()) {
        Some(calls) => {
            for Comparison { what, found, golden } in calls {
                check(&what, &found, &golden, SINGLE_CALL);
            }
        }
        None => println!("skipped: {} holds no VAE golden", goldens().display()),
    }
}
