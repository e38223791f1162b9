//! `podvisor id-block`: signs what pins a launch to a digest, as files for whoever launches, and reads the keys for it. The
//! structures and signatures are `podvisor_snp::id_block`'s; an IGVM image gets its ID block in `igvm build`.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use podvisor_firmware::plan::IdBlock;
use podvisor_snp::id_block::{self, Signer, SignerError};
use serde_json::json;

use super::attest::{digest_of, exactly};
use super::{Failure, chain, print};
use crate::hex;

/// `podvisor id-block`.
#[derive(Debug, Subcommand)]
pub(crate) enum IdBlockCommand {
    /// Sign an ID block: the firmware starts no guest whose launch digest or policy is another.
    Sign(SignArgs),
}

/// `podvisor id-block sign`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: podvisor id-block sign --id-key id.pem --author-key author.pem --image pod.igvm --vcpus 2 \\
    --block pod.id-block --auth pod.id-auth"
)]
pub(crate) struct SignArgs {
    /// P-384 private key (PEM) that signs the block.
    #[arg(long, value_name = "PEM")]
    id_key: PathBuf,
    /// P-384 private key (PEM) that signs the ID key.
    #[arg(long, value_name = "PEM")]
    author_key: Option<PathBuf>,
    /// Launch digest that is signed.
    #[arg(
        long,
        value_name = "HEX",
        required_unless_present = "image",
        conflicts_with = "image"
    )]
    digest: Option<String>,
    /// IGVM image whose launch digest is signed.
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// vCPUs that --image is started with.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "image")]
    vcpus: u32,
    /// The SNP guest policy, in hex; the launch must have the same.
    #[arg(long, value_name = "HEX", default_value = "0x30000", value_parser = super::igvm_build::policy)]
    policy: u64,
    /// FAMILY_ID of the guest's reports.
    #[arg(long, value_name = "HEX")]
    family_id: Option<String>,
    /// IMAGE_ID of the guest's reports.
    #[arg(long, value_name = "HEX")]
    image_id: Option<String>,
    /// GUEST_SVN of the guest's reports.
    #[arg(long, value_name = "N", default_value_t = 0)]
    guest_svn: u32,
    /// Where the ID block goes: 96 bytes.
    #[arg(long, value_name = "FILE")]
    block: PathBuf,
    /// Where the ID authentication information goes: 4096 bytes.
    #[arg(long, value_name = "FILE")]
    auth: PathBuf,
}

/// Runs the command. Prints the digests of the keys, which reports will have, as JSON.
pub(super) fn run(command: &IdBlockCommand) -> Result<(), Failure> {
    let IdBlockCommand::Sign(args) = command;
    let digest = match (&args.digest, &args.image) {
        (Some(digest), _) => exactly("--digest", digest)?,
        (None, Some(image)) => digest_of(image, args.vcpus)?,
        (None, None) => return Err(Failure::usage("--digest or --image: one of them must be given")),
    };
    let id = |option, text: &Option<String>| text.as_deref().map_or(Ok([0; 16]), |text| exactly(option, text));
    let mut signed = id_block::unsigned(digest);
    signed.family_id = id("--family-id", &args.family_id)?;
    signed.image_id = id("--image-id", &args.image_id)?;
    signed.guest_svn = args.guest_svn;
    let signers = Signers::read(&args.id_key, args.author_key.as_deref())?;
    let fail = |e: &dyn std::error::Error| Failure::runtime(chain(e));
    signers.sign(&mut signed, args.policy).map_err(|e| fail(&e))?;
    let (block, auth) = (id_block::block(&signed, args.policy), id_block::auth(&signed));
    // As the firmware will look at it: what it would refuse does not leave this program.
    let identity =
        id_block::check(&block, &auth, signed.author_key_enabled, &digest, args.policy).map_err(|e| fail(&e))?;
    for (path, bytes) in [(&args.block, &block[..]), (&args.auth, &auth[..])] {
        std::fs::write(path, bytes).map_err(|e| Failure::runtime(format!("{}: {e}", path.display())))?;
    }
    let author = identity
        .author_key_enabled
        .then(|| hex::encode(&identity.author_key_digest.0));
    let said = json!({
        "launch_digest": hex::encode(&digest),
        "id_key_digest": hex::encode(&identity.id_key_digest.0),
        "author_key_digest": author,
    });
    print(&said.to_string())
}

/// The keys of an ID block.
pub(super) struct Signers {
    id: Signer,
    author: Option<Signer>,
}

impl Signers {
    /// Reads them from PEM files; errors name the option.
    pub(super) fn read(id: &Path, author: Option<&Path>) -> Result<Self, Failure> {
        let read = |option: &str, path: &Path| {
            let fail = |e: &dyn std::error::Error| Failure::runtime(format!("{option} {}: {e}", path.display()));
            let text = std::fs::read(path).map_err(|e| fail(&e))?;
            Signer::from_pem(&text).map_err(|e| fail(&e))
        };
        Ok(Self {
            id: read("--id-key", id)?,
            author: author.map(|path| read("--author-key", path)).transpose()?,
        })
    }

    /// Signs `block` for a launch with `policy`.
    pub(super) fn sign(&self, block: &mut IdBlock, policy: u64) -> Result<(), SignerError> {
        self.id.sign_block(block, policy, self.author.as_ref())
    }
}
