//! A certificate authority made for one test.

use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

/// PEM files in a directory: `ca.pem`, `server.pem` and `server-key.pem` (for loopback and `registry.test`),
/// `client.pem` and `client-key.pem`.
pub(crate) struct Certificates(TempDir);

impl Certificates {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut authority = CertificateParams::new([]).unwrap();
        // Without a name of its own it would pass for any other, up to the signature.
        authority.distinguished_name.push(DnType::CommonName, directory.path().display().to_string());
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let write = |name: &str, pem: String| std::fs::write(directory.path().join(name), pem).unwrap();
        write("ca.pem", authority.self_signed(&key).unwrap().pem());
        let issuer = Issuer::new(authority, key);
        let issue = |name: &str, names: &[&str], usage| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let mut parameters = CertificateParams::new(names).unwrap();
            parameters.extended_key_usages = vec![usage];
            let key = KeyPair::generate().unwrap();
            write(&format!("{name}.pem"), parameters.signed_by(&key, &issuer).unwrap().pem());
            write(&format!("{name}-key.pem"), key.serialize_pem());
        };
        issue("server", &["127.0.0.1", "localhost", "registry.test"], ExtendedKeyUsagePurpose::ServerAuth);
        issue("client", &["a-node.test"], ExtendedKeyUsagePurpose::ClientAuth);
        Self(directory)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}
