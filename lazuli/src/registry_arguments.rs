//! Flags of every command that speaks to registries.

use std::path::PathBuf;

use clap::Args;
use registry::{Client, ClientOptions, PlainHttp};

/// How registries are spoken to.
#[derive(Debug, Args)]
pub(crate) struct RegistryArguments {
    /// Speak plain HTTP to these registries, named with their ports; on loopback that is done anyway
    #[arg(long, value_name = "HOST", value_delimiter = ',', require_equals = true)]
    plain_http: Vec<String>,
    /// Hosts that a registry may have uploads sent to, beside itself
    #[arg(long, value_name = "HOST", value_delimiter = ',', require_equals = true)]
    upload_host: Vec<String>,
    /// Directory of mirrors and certificates as containerd's /etc/containerd/certs.d [default: $LAZULI_HOSTS_DIR]
    #[arg(long, value_name = "DIR")]
    hosts_dir: Option<PathBuf>,
}

impl RegistryArguments {
    /// A client that does as the flags and the environment say.
    ///
    /// # Errors
    ///
    /// When the directory of a flag is none: it would be as if there were no mirrors and certificates. One of the
    /// environment may be missing, as on a machine that has none.
    pub(crate) fn into_client(self) -> Result<Client, String> {
        let Self { plain_http, upload_host, hosts_dir } = self;
        let plain_http = match plain_http.is_empty() {
            true => PlainHttp::Never,
            false => PlainHttp::Hosts(plain_http.into_iter().collect()),
        };
        if let Some(directory) = hosts_dir.as_ref().filter(|path| !path.is_dir()) {
            return Err(format!("--hosts-dir {}: there is no such directory", directory.display()));
        }
        let upload_hosts = upload_host.into_iter().collect();
        let options = ClientOptions::from_environment();
        let hosts_dir = hosts_dir.or(options.hosts_dir);
        Ok(Client::new(ClientOptions { plain_http, upload_hosts, hosts_dir, ..options }))
    }
}
