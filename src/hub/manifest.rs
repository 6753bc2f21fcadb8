//! Which files make a model: those of the published ones, pinned, and those of any other
//! repository as its server lists them.

use std::fmt;
use std::str::FromStr;

use super::names::{RepoId, check_file, check_revision};
use crate::checkpoint::{Family, Variant};
use crate::{Error, Result};

/// A model as it is named on the command line, such as `miniflux-768p`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PublishedModel {
    /// Which of the two published repositories.
    pub family: Family,
    /// Which transformer of it.
    pub variant: Variant,
}

impl PublishedModel {
    /// All that there are.
    pub const ALL: [PublishedModel; 5] = [
        PublishedModel { family: Family::Sd3, variant: Variant::P384 },
        PublishedModel { family: Family::Sd3, variant: Variant::P768 },
        PublishedModel { family: Family::Miniflux, variant: Variant::P384 },
        PublishedModel { family: Family::Miniflux, variant: Variant::P768 },
        PublishedModel { family: Family::Miniflux, variant: Variant::Image },
    ];

    /// The model called `name`, if there is one.
    pub fn from_name(name: &str) -> Option<PublishedModel> {
        Self::ALL.into_iter().find(|model| model.to_string() == name)
    }

    /// The names of all, for messages.
    pub fn names() -> String {
        Self::ALL.map(|model| model.to_string()).join(", ")
    }

    /// Where it is published.
    pub fn repo(self) -> RepoId {
        let name = match self.family {
            Family::Sd3 => "rain1011/pyramid-flow-sd3",
            Family::Miniflux => "rain1011/pyramid-flow-miniflux",
        };
        // The names above are names.
        name.parse().unwrap_or_else(|e| unreachable!("{e}"))
    }

    /// Its files at the commit that this program was made for.
    pub fn manifest(self) -> Manifest {
        let (revision, files) = match self.family {
            Family::Sd3 => (SD3_COMMIT, SD3_FILES),
            Family::Miniflux => (MINIFLUX_COMMIT, MINIFLUX_FILES),
        };
        let own = format!("{}/", self.variant.folder());
        let belongs = |path: &str| !is_transformer(path) || path.starts_with(&own);
        let files = files
            .iter()
            .filter(|file| belongs(file.path))
            .map(|file| ManifestFile {
                path: file.path.to_owned(),
                bytes: file.bytes,
                sha256: file.sha256.map(str::to_owned),
            })
            .collect();
        Manifest { repo: self.repo(), revision: revision.to_owned(), reference: None, files }
    }
}

impl fmt::Display for PublishedModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.family, self.variant)
    }
}

/// Whether a file belongs to one of a repository's transformers.
pub(super) fn is_transformer(path: &str) -> bool {
    path.starts_with("diffusion_transformer_")
}

/// What `pull` and the other commands are given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelName {
    /// One of the published models.
    Published(PublishedModel),
    /// Another repository, at a branch, tag or commit.
    Repo(RepoId, String),
}

impl FromStr for ModelName {
    type Err = Error;

    /// `sd3-768p` and the like, `OWNER/NAME` or `OWNER/NAME@REVISION`.
    fn from_str(text: &str) -> Result<ModelName> {
        if let Some(model) = PublishedModel::from_name(text) {
            return Ok(ModelName::Published(model));
        }
        if !text.contains('/') {
            return Err(Error::usage(format!("there is no model {text:?}")).hint(format!(
                "the models are {}; another repository is named OWNER/NAME",
                PublishedModel::names()
            )));
        }
        let (repo, revision) = text.split_once('@').unwrap_or((text, "main"));
        check_revision(revision)?;
        Ok(ModelName::Repo(repo.parse()?, revision.to_owned()))
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ModelName::Published(model) => model.fmt(f),
            ModelName::Repo(repo, revision) if revision == "main" => repo.fmt(f),
            ModelName::Repo(repo, revision) => write!(f, "{repo}@{revision}"),
        }
    }
}

/// The files to fetch of one commit of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The repository.
    pub repo: RepoId,
    /// The full name of the commit.
    pub revision: String,
    /// The branch or tag that was asked for and is that commit now.
    pub reference: Option<String>,
    /// The files.
    pub files: Vec<ManifestFile>,
}

/// One file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestFile {
    /// Its path in the repository.
    pub path: String,
    /// Its length, where it is known beforehand.
    pub bytes: Option<u64>,
    /// Its hash, where it is known beforehand; otherwise the server's own is believed.
    pub sha256: Option<String>,
}

impl Manifest {
    /// # Errors
    /// [`crate::ErrorKind::Model`] if a name could be written anywhere but in its folder.
    pub(super) fn check(&self) -> Result<()> {
        self.files.iter().try_for_each(|file| check_file(&file.path))
    }

    /// The folders that the files lie in.
    pub(super) fn folders(&self) -> Vec<&str> {
        let mut folders: Vec<&str> =
            self.files.iter().filter_map(|f| Some(f.path.rsplit_once('/')?.0)).collect();
        folders.sort_unstable();
        folders.dedup();
        folders
    }
}

/// Picks the files of a checkpoint out of all files of a repository: those in the folders
/// that checkpoints have, weights once (as safetensors where there are both).
pub(super) fn checkpoint_files(all: &[String], variant: Option<Variant>) -> Vec<ManifestFile> {
    const FOLDERS: [&str; 7] = [
        "causal_video_vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
    ];
    let wanted = |path: &String| {
        let Some((folder, name)) = path.split_once('/') else { return false };
        let known = match variant {
            _ if FOLDERS.contains(&folder) => true,
            Some(variant) => folder == variant.folder(),
            None => Variant::ALL.iter().any(|v| v.folder() == folder),
        };
        let kind = [".json", ".txt", ".model", ".safetensors", ".bin"];
        known && !name.contains('/') && kind.iter().any(|ending| name.ends_with(ending))
    };
    let kept: Vec<&String> = all.iter().filter(|path| wanted(path)).collect();
    let folder = |path: &str| path.split('/').next().unwrap_or_default().to_owned();
    let safe = |bin: &str| {
        let mut others = kept.iter().filter(|path| folder(path) == folder(bin));
        others.any(|path| path.ends_with(".safetensors"))
    };
    kept.iter()
        .filter(|path| !(path.ends_with(".bin") && safe(path)))
        .map(|path| ManifestFile { path: path.to_string(), bytes: None, sha256: None })
        .collect()
}

struct Pinned {
    path: &'static str,
    bytes: Option<u64>,
    sha256: Option<&'static str>,
}

/// A small file: the server's hash, which is part of the commit's, is enough.
const fn small(path: &'static str) -> Pinned {
    Pinned { path, bytes: None, sha256: None }
}

const fn large(path: &'static str, sha256: &'static str) -> Pinned {
    Pinned { path, bytes: None, sha256: Some(sha256) }
}

const fn exact(path: &'static str, bytes: u64, sha256: &'static str) -> Pinned {
    Pinned { path, bytes: Some(bytes), sha256: Some(sha256) }
}

/// The commit whose files were listed when this was written.
const SD3_COMMIT: &str = "8fe3939412dd82c08c642b04d826f51d87e2620b";

/// Hashes as the hub's own pages show them; those of T5 are from pages of copies of the
/// repository.
const SD3_FILES: &[Pinned] = &[
    small("causal_video_vae/config.json"),
    exact(
        "causal_video_vae/diffusion_pytorch_model.safetensors",
        1_341_638_684,
        "c3e46120712f14a7e8a010264294754c113677085bab2b6cf051f1758cab238e",
    ),
    small("diffusion_transformer_384p/config.json"),
    exact(
        "diffusion_transformer_384p/diffusion_pytorch_model.safetensors",
        8_339_919_144,
        "59eeee86ade2c2765a6703e628c81e09b7c5e7191775aa80c5fb552313cc33be",
    ),
    small("diffusion_transformer_768p/config.json"),
    exact(
        "diffusion_transformer_768p/diffusion_pytorch_model.safetensors",
        8_339_919_144,
        "7262ac5271e549ea87b8b05610663f16cf490eec19f525d4e2709c929cf52665",
    ),
    small("text_encoder/config.json"),
    large(
        "text_encoder/model.safetensors",
        "71e183d11db0c6b6282a4d9e0abb74125edc8692393e89ed8ee5571005f35cb1",
    ),
    small("text_encoder_2/config.json"),
    large(
        "text_encoder_2/model.safetensors",
        "ec310df2af79c318e24d20511b601a591ca8cd4f1fce1d8dff822a356bcdb1f4",
    ),
    small("text_encoder_3/config.json"),
    exact(
        "text_encoder_3/model-00001-of-00002.safetensors",
        4_994_582_104,
        "4f2751ceeb2a96edd693e539dc5d6bba0b8d3814f49a9b3798403a0cec4b2e3d",
    ),
    exact(
        "text_encoder_3/model-00002-of-00002.safetensors",
        4_530_066_248,
        "f63154532130422309532ff56f11945fbea8266c958e3133e8e5aef85c6293c7",
    ),
    small("text_encoder_3/model.safetensors.index.json"),
    small("tokenizer/merges.txt"),
    small("tokenizer/special_tokens_map.json"),
    small("tokenizer/tokenizer_config.json"),
    small("tokenizer/vocab.json"),
    small("tokenizer_2/merges.txt"),
    small("tokenizer_2/special_tokens_map.json"),
    small("tokenizer_2/tokenizer_config.json"),
    small("tokenizer_2/vocab.json"),
    small("tokenizer_3/special_tokens_map.json"),
    small("tokenizer_3/spiece.model"),
    small("tokenizer_3/tokenizer.json"),
    small("tokenizer_3/tokenizer_config.json"),
];

/// The commit that added the last weights; later ones change the model card.
const MINIFLUX_COMMIT: &str = "dd0ab8f28f5376e25a17661ce1a6c92ba5b4fda9";

/// As above. No hash of the VAE, of the image model, of CLIP-L and of T5's second file was
/// found: these are held to the server's. T5's first is from a copy of the repository.
const MINIFLUX_FILES: &[Pinned] = &[
    small("causal_video_vae/config.json"),
    small("causal_video_vae/diffusion_pytorch_model.bin"),
    small("diffusion_transformer_384p/config.json"),
    exact(
        "diffusion_transformer_384p/diffusion_pytorch_model.safetensors",
        7_888_294_568,
        "76ab1a5f81f5c69285ad8040e8282a6260dae5ca601d7f614bd9de38a46316b5",
    ),
    small("diffusion_transformer_768p/config.json"),
    exact(
        "diffusion_transformer_768p/diffusion_pytorch_model.safetensors",
        7_888_294_568,
        "864de0e1afd9dd2c373d957ac2c54346f5006036dc7aa8ec7605db80eea2272c",
    ),
    small("diffusion_transformer_image/config.json"),
    small("diffusion_transformer_image/diffusion_pytorch_model.safetensors"),
    small("text_encoder/config.json"),
    small("text_encoder/model.safetensors"),
    small("text_encoder_2/config.json"),
    large(
        "text_encoder_2/model-00001-of-00002.safetensors",
        "ec87bffd1923e8b2774a6d240c922a41f6143081d52cf83b8fe39e9d838c893e",
    ),
    small("text_encoder_2/model-00002-of-00002.safetensors"),
    small("text_encoder_2/model.safetensors.index.json"),
    small("tokenizer/merges.txt"),
    small("tokenizer/special_tokens_map.json"),
    small("tokenizer/tokenizer_config.json"),
    small("tokenizer/vocab.json"),
    small("tokenizer_2/special_tokens_map.json"),
    small("tokenizer_2/spiece.model"),
    small("tokenizer_2/tokenizer.json"),
    small("tokenizer_2/tokenizer_config.json"),
];

#[cfg(test)]
mod tests {
    use super::super::names::{is_commit, is_hex};
    use super::*;

    #[test]
    fn the_pinned_manifests_are_well_formed() {
        for model in PublishedModel::ALL {
            assert_eq!(PublishedModel::from_name(&model.to_string()), Some(model));
            let manifest = model.manifest();
            manifest.check().unwrap();
            assert!(is_commit(&manifest.revision));
            let transformers: Vec<_> =
                manifest.folders().into_iter().filter(|f| is_transformer(f)).collect();
            assert_eq!(transformers, [model.variant.folder()], "{model}");
            for file in &manifest.files {
                let known = file.sha256.as_ref();
                assert!(known.is_none_or(|h| is_hex(h, 64)), "{}", file.path);
                assert_eq!(manifest.files.iter().filter(|f| f.path == file.path).count(), 1);
            }
        }
        assert_eq!(PublishedModel::from_name("sd3-image"), None);
    }

    #[test]
    fn names_as_typed() {
        let name = |text: &str| text.parse::<ModelName>();
        assert_eq!(name("sd3-768p").unwrap().to_string(), "sd3-768p");
        assert_eq!(name("a/b").unwrap().to_string(), "a/b");
        assert_eq!(name("a/b@v1").unwrap().to_string(), "a/b@v1");
        assert!(name("sd3").unwrap_err().hint_text().unwrap().contains("miniflux-image"));
        for bad in ["a/b@../c", "a/b/c", "a/b@"] {
            assert!(name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_a_checkpoint_is_taken_out_of_a_repository() {
        let all = [
            "README.md",
            "diffusion_transformer_384p/config.json",
            "notes/x.json",
            "diffusion_transformer_768p/config.json",
            "causal_video_vae/config.json",
            "diffusion_transformer_768p/diffusion_pytorch_model.bin",
            "diffusion_transformer_768p/diffusion_pytorch_model.safetensors",
            "causal_video_vae/diffusion_pytorch_model.bin",
            "causal_video_vae/old/model.bin",
            "tokenizer/vocab.json",
            "tokenizer/.gitattributes",
            "run.py",
        ]
        .map(str::to_owned);
        let picked = |variant| -> Vec<String> {
            checkpoint_files(&all, variant).into_iter().map(|file| file.path).collect()
        };
        assert_eq!(
            picked(Some(Variant::P768)),
            [
                "diffusion_transformer_768p/config.json",
                "causal_video_vae/config.json",
                "diffusion_transformer_768p/diffusion_pytorch_model.safetensors",
                "causal_video_vae/diffusion_pytorch_model.bin",
                "tokenizer/vocab.json",
            ]
        );
        assert_eq!(picked(None).len(), 6);
    }
}
