//! TLS with a real registry: CAs and client certificates as `hosts.toml` and docker name them.

use registry::{Client, Error};

use crate::{certificates::Certificates, client_with_hosts, docker_registry::DockerRegistry, hosts_dir, push_image};

/// Pushes and reads an image at `registry` with `lines` in its `hosts.toml`; `CERTS` there is where certificates are.
async fn exchange(registry: &DockerRegistry, certificates: &Certificates, lines: &str) -> Result<(), Error> {
    let lines = lines.replace("CERTS", &certificates.path().display().to_string());
    let hosts = hosts_dir(&[(registry.host(), &format!("server = \"https://{}\"\n{lines}", registry.host()))]);
    let (client, reference) = (client_with_hosts(&hosts), registry.reference("a:v1"));
    client.manifest_digest(&reference).await?;
    let (bytes, _) = push_image(&client, &reference).await;
    assert_eq!(client.manifest(&reference).await?.bytes, bytes);
    Ok(())
}

#[tokio::test]
async fn a_ca_of_hosts_toml_is_trusted() {
    let certificates = Certificates::new();
    let registry = DockerRegistry::start_with_tls(&certificates, false);
    exchange(&registry, &certificates, "ca = \"CERTS/ca.pem\"").await.unwrap();
    exchange(&registry, &certificates, "ca = [\"CERTS/ca.pem\"]").await.unwrap();
    exchange(&registry, &certificates, "skip_verify = true").await.unwrap();
}

#[tokio::test]
async fn an_unknown_ca_is_said_in_one_line() {
    let (certificates, others) = (Certificates::new(), Certificates::new());
    let registry = DockerRegistry::start_with_tls(&certificates, false);
    for lines in ["", "ca = \"CERTS/ca.pem\""] {
        let error = exchange(&registry, &others, lines).await.unwrap_err();
        assert!(matches!(error, Error::Tls { .. }), "{error:?}");
        let expected = format!(
            "manifest of {}/a:v1: TLS with {0} failed: invalid peer certificate: UnknownIssuer; install its CA certificate or name it in hosts.toml, or use --plain-http if it has no TLS",
            registry.host()
        );
        assert_eq!(error.to_string(), expected);
    }
}

#[tokio::test]
async fn a_client_certificate_opens_what_asks_for_one() {
    let certificates = Certificates::new();
    let registry = DockerRegistry::start_with_tls(&certificates, true);
    let ca = "ca = \"CERTS/ca.pem\"\n";
    let pair = format!("{ca}client = [[\"CERTS/client.pem\", \"CERTS/client-key.pem\"]]");
    exchange(&registry, &certificates, &pair).await.unwrap();
    let read = |name: &str| std::fs::read_to_string(certificates.path().join(name)).unwrap();
    std::fs::write(certificates.path().join("both.pem"), read("client-key.pem") + &read("client.pem")).unwrap();
    exchange(&registry, &certificates, &format!("{ca}client = \"CERTS/both.pem\"")).await.unwrap();
    exchange(&registry, &certificates, &format!("{ca}client = [[\"CERTS/both.pem\", \"\"]]")).await.unwrap();
}

#[tokio::test]
async fn several_client_certificates_are_tried_in_their_order() {
    let (certificates, others) = (Certificates::new(), Certificates::new());
    let registry = DockerRegistry::start_with_tls(&certificates, true);
    let pair = |of: &Certificates| format!("[\"{0}/client.pem\", \"{0}/client-key.pem\"]", of.path().display());
    let with = |pairs: [String; 2]| format!("ca = \"CERTS/ca.pem\"\nclient = [{}]", pairs.join(", "));
    exchange(&registry, &certificates, &with([pair(&others), pair(&certificates)])).await.unwrap();
    exchange(&registry, &certificates, &with([pair(&certificates), pair(&others)])).await.unwrap();
    // The last word may be the alert or the closed connection, whichever arrives.
    exchange(&registry, &certificates, &with([pair(&others), pair(&others)])).await.unwrap_err();
}

#[tokio::test]
async fn a_missing_client_certificate_is_named() {
    let (certificates, others) = (Certificates::new(), Certificates::new());
    let registry = DockerRegistry::start_with_tls(&certificates, true);
    let stranger = format!("client = [[\"{0}/client.pem\", \"{0}/client-key.pem\"]]\n", others.path().display());
    for client in ["", &stranger] {
        let error = exchange(&registry, &certificates, &format!("ca = \"CERTS/ca.pem\"\n{client}")).await.unwrap_err();
        let text = error.to_string();
        // In TLS 1.3 the alert comes after the handshake, and may be overtaken by the end of the connection.
        let is_told = text.contains("refuses us without a client certificate that it knows: received fatal alert: ");
        let is_closed =
            text.contains("as where a client certificate is refused: if the registry wants one, name it in hosts");
        assert!(is_told || is_closed, "{text}");
        assert!(is_closed || matches!(error, Error::ClientCertificate { .. }), "{text}");
    }
}

#[tokio::test]
async fn dockers_certificate_files_are_taken() {
    let certificates = Certificates::new();
    let registry = DockerRegistry::start_with_tls(&certificates, true);
    let hosts = tempfile::tempdir().unwrap();
    // The form with underscores comes first, and is the one that Windows can have.
    let folder = hosts.path().join(format!("{}_", registry.host().replace(':', "_")));
    std::fs::create_dir(&folder).unwrap();
    for (from, to) in [("ca.pem", "ca.crt"), ("client.pem", "client.cert"), ("client-key.pem", "client.key")] {
        std::fs::copy(certificates.path().join(from), folder.join(to)).unwrap();
    }
    let (client, reference): (Client, _) = (client_with_hosts(&hosts), registry.reference("a:v1"));
    let (bytes, _) = push_image(&client, &reference).await;
    assert_eq!(client.manifest(&reference).await.unwrap().bytes, bytes);
}
