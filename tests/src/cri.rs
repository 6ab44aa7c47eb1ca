//! A small client of the container runtime interface, as kubelet would use it.

use std::{path::Path, time::Duration};

use k8s_cri::v1::{
    AuthConfig, ContainerConfig, ContainerMetadata, CreateContainerRequest, ExecSyncRequest, IdMapping, ImageSpec,
    LinuxContainerConfig, LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PullImageRequest, RemoveImageRequest,
    RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest, StatusRequest, StopPodSandboxRequest,
    UserNamespace, image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};
use tokio::runtime::Runtime;
use tonic::{Response, Status, transport::Channel};

use crate::{
    error::{Context as _, HarnessError, Result},
    process::{Finished, wait_for},
};

/// How long one call may take; pulling a large image is the longest.
const CALL_PATIENCE: Duration = Duration::from_secs(120);
/// How long a command in a container may take.
const EXEC_SECONDS_MAX: i64 = 60;

/// A connection to the container runtime interface of a containerd. Blocks.
#[derive(Debug)]
pub struct Cri {
    runtime: Runtime,
    pods: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

impl Cri {
    /// Connects to `socket` and waits until the network is ready.
    ///
    /// # Errors
    ///
    /// When nobody answers, or no network configuration is found in time.
    pub fn connect(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("making a runtime")?;
        let connected = runtime.block_on(containerd_client::connect(socket));
        let channel = connected
            .map_err(|error| HarnessError::Unexpected(format!("cannot connect to {}: {error}", socket.display())))?;
        let cri = Self {
            runtime,
            pods: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
        };
        cri.wait_until_ready()?;
        Ok(cri)
    }

    /// Waits until pods can be started: at first, and after containerd was restarted.
    ///
    /// # Errors
    ///
    /// When they cannot be in time.
    pub fn wait_until_ready(&self) -> Result<()> {
        // Who asks while containerd restarts is refused.
        wait_for("containerd's network was not ready", || Ok(self.is_ready().is_ok_and(|ready| ready).then_some(())))
    }

    fn is_ready(&self) -> Result<bool> {
        let mut pods = self.pods.clone();
        let answer = self.call("Status", pods.status(StatusRequest { verbose: false }))?;
        // containerd 2 has a condition more, which speaks of its configuration.
        let conditions = answer.status.map(|status| status.conditions).unwrap_or_default();
        let is_met = |wanted| conditions.iter().any(|condition| condition.r#type == wanted && condition.status);
        Ok(is_met("RuntimeReady") && is_met("NetworkReady"))
    }

    /// Pulls an image; returns its ID, the digest of its configuration.
    ///
    /// # Errors
    ///
    /// When containerd refuses.
    pub fn pull_image(&self, reference: &str) -> Result<String> {
        let mut images = self.images.clone();
        let request = PullImageRequest { image: Some(image(reference)), ..Default::default() };
        Ok(self.call("PullImage", images.pull_image(request))?.image_ref)
    }

    /// Pulls an image with a secret, as kubelet does for a pod that names one.
    ///
    /// # Errors
    ///
    /// When containerd refuses.
    pub fn pull_image_as(&self, reference: &str, (user, password): (&str, &str)) -> Result<String> {
        let mut images = self.images.clone();
        let auth = AuthConfig { username: user.to_owned(), password: password.to_owned(), ..Default::default() };
        let request = PullImageRequest { image: Some(image(reference)), auth: Some(auth), ..Default::default() };
        Ok(self.call("PullImage", images.pull_image(request))?.image_ref)
    }

    /// Removes an image.
    ///
    /// # Errors
    ///
    /// When containerd refuses.
    pub fn remove_image(&self, reference: &str) -> Result<()> {
        let mut images = self.images.clone();
        let request = RemoveImageRequest { image: Some(image(reference)) };
        self.call("RemoveImage", images.remove_image(request)).map(drop)
    }

    /// Starts an empty pod.
    ///
    /// # Errors
    ///
    /// When containerd refuses.
    pub fn run_pod(&self, name: &str) -> Result<Pod<'_>> {
        self.run_pod_in(name, NamespaceOption::default())
    }

    /// Starts an empty pod with a user namespace of its own, whose users and groups are `count` of the host from
    /// `first` on.
    ///
    /// # Errors
    ///
    /// When containerd refuses.
    pub fn run_pod_with_users(&self, name: &str, first: u32, count: u32) -> Result<Pod<'_>> {
        let ids = vec![IdMapping { host_id: first, container_id: 0, length: count }];
        let users = UserNamespace { mode: NamespaceMode::Pod.into(), uids: ids.clone(), gids: ids };
        self.run_pod_in(name, NamespaceOption { userns_options: Some(users), ..NamespaceOption::default() })
    }

    fn run_pod_in(&self, name: &str, namespaces: NamespaceOption) -> Result<Pod<'_>> {
        let mut pods = self.pods.clone();
        let metadata = PodSandboxMetadata {
            name: name.to_owned(),
            uid: name.to_owned(),
            namespace: "default".to_owned(),
            attempt: 0,
        };
        let config = PodSandboxConfig {
            metadata: Some(metadata),
            hostname: name.to_owned(),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces.clone()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
        let id = self.call("RunPodSandbox", pods.run_pod_sandbox(request))?.pod_sandbox_id;
        Ok(Pod { cri: self, id, config, namespaces })
    }

    fn call<T>(
        &self,
        call: &'static str,
        future: impl Future<Output = std::result::Result<Response<T>, Status>>,
    ) -> Result<T> {
        let answer = self.runtime.block_on(async { tokio::time::timeout(CALL_PATIENCE, future).await });
        match answer {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(HarnessError::Rpc { call, status: Box::new(status) }),
            Err(_) => {
                let what = format!("{call} was not answered");
                Err(HarnessError::Timeout { what, seconds: CALL_PATIENCE.as_secs() })
            }
        }
    }
}

/// A running pod; dropping it stops and removes it with its containers and its network.
#[derive(Debug)]
pub struct Pod<'a> {
    cri: &'a Cri,
    id: String,
    config: PodSandboxConfig,
    namespaces: NamespaceOption,
}

impl Pod<'_> {
    /// Creates and starts a container of an image that was pulled; returns its ID.
    ///
    /// # Errors
    ///
    /// When containerd refuses.
    pub fn start_container(&self, name: &str, reference: &str, words: &[&str]) -> Result<String> {
        let mut pods = self.cri.pods.clone();
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: Some(image(reference)),
            command: words.iter().map(|&word| word.to_owned()).collect(),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(self.namespaces.clone()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let container_id = self.cri.call("CreateContainer", pods.create_container(request))?.container_id;
        let request = StartContainerRequest { container_id: container_id.clone() };
        self.cri.call("StartContainer", pods.start_container(request))?;
        Ok(container_id)
    }

    /// Runs a command in a container and waits for its end.
    ///
    /// # Errors
    ///
    /// When it cannot be started; not when it fails.
    pub fn exec(&self, container: &str, words: &[&str]) -> Result<Finished> {
        let mut pods = self.cri.pods.clone();
        let request = ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: words.iter().map(|&word| word.to_owned()).collect(),
            timeout: EXEC_SECONDS_MAX,
        };
        let answer = self.cri.call("ExecSync", pods.exec_sync(request))?;
        Ok(Finished {
            code: Some(answer.exit_code),
            stdout: String::from_utf8_lossy(&answer.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&answer.stderr).into_owned(),
        })
    }

    /// Runs a shell script in a container; returns its standard output.
    ///
    /// # Errors
    ///
    /// When it cannot be started, or fails.
    pub fn shell(&self, container: &str, script: &str) -> Result<String> {
        self.exec(container, &["/bin/sh", "-c", script])?.stdout_of(script)
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        let mut pods = self.cri.pods.clone();
        let stop = StopPodSandboxRequest { pod_sandbox_id: self.id.clone() };
        let stopped = self.cri.call("StopPodSandbox", pods.stop_pod_sandbox(stop));
        let remove = RemovePodSandboxRequest { pod_sandbox_id: self.id.clone() };
        let removed = self.cri.call("RemovePodSandbox", pods.remove_pod_sandbox(remove));
        if let Err(error) = stopped.and(removed) {
            eprintln!("pod {} is left over: {error}", self.id);
        }
    }
}

fn image(reference: &str) -> ImageSpec {
    ImageSpec { image: reference.to_owned(), ..Default::default() }
}
