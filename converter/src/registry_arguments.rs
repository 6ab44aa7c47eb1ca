//! Flags of every command that speaks to registries.

use std::path::PathBuf;

use clap::Args;
use registry::{Client, ClientOptions};

/// How registries are spoken to.
#[derive(Debug, Args)]
pub(crate) struct RegistryArguments {
    /// Speak plain HTTP to registries; loopback addresses are spoken to in plain HTTP anyway
    #[arg(long)]
    plain_http: bool,
    /// Directory of mirrors and certificates as containerd's /etc/containerd/certs.d [default: $LAZULI_HOSTS_DIR]
    #[arg(long, value_name = "DIR")]
    hosts_dir: Option<PathBuf>,
}

impl RegistryArguments {
    /// A client that does as the flags and the environment say.
    pub(crate) fn into_client(self) -> Client {
        let Self { plain_http, hosts_dir } = self;
        let options = ClientOptions::from_environment();
        let hosts_dir = hosts_dir.or(options.hosts_dir);
        Client::new(ClientOptions { plain_http, hosts_dir, ..options })
    }
}
