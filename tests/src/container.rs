//! A DaemonSet's pod on a node, as a kubelet and its container runtime run it: what the manifests say of arguments, variables,
//! mounts and rights becomes a bundle that `crun` runs on the image of `cargo xtask image`.
//!
//! Only what is a node's own is the test's instead: its network namespace, and the directories that stand for its hostPaths.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Container as Spec, PodSpec, SecurityContext};
use serde_json::{Value, json};

use crate::leftovers::unique_name;
use crate::netns::Namespace;
use crate::process::{Process, built};

/// Where a pod finds its service account.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// The address of the `kubernetes` Service, as a kubelet tells every pod; nobody is there.
const KUBERNETES: [&str; 2] = ["KUBERNETES_SERVICE_HOST=10.96.0.1", "KUBERNETES_SERVICE_PORT=443"];
/// A certificate authority that has signed nothing: a service account needs one, the tests' API does not.
const AUTHORITY: &str = "\
-----BEGIN CERTIFICATE-----
MIIBhTCCASugAwIBAgIUTJMK2wE+FHEu7BVEkjbsC1CXApYwCgYIKoZIzj0EAwIw
FzEVMBMGA1UEAwwMc2hlYXZlLXRlc3RzMCAXDTI2MTEyMTIwNDkwOVoYDzIxMjYx
MDI4MjA0OTA5WjAXMRUwEwYDVQQDDAxzaGVhdmUtdGVzdHMwWTATBgcqhkjOPQIB
BggqhkjOPQMBBwNCAARWmx8hpCY/Ht5Fmfeny481RUaTsf/LBvEy7QwEoCjoqrH5
ceI3S10DdaNePEqsASNAtUysWuNmwV9aP24apR8po1MwUTAdBgNVHQ4EFgQUMSyU
JbYPj9Ypb0zgAfonloGUyQswHwYDVR0jBBgwFoAUMSyUJbYPj9Ypb0zgAfonloGU
yQswDwYDVR0TAQH/BAUwAwEB/zAKBggqhkjOPQQDAgNIADBFAiEA9WTkUln7mEyv
hdvvGO98QlV1wlZuI8hAHQzhJ37JNKwCIH8qR47NxaLZ2tYO4eOloLtIFzr5J9+9
D0jI95Jl4s6Z
-----END CERTIFICATE-----
";

/// System calls that the runtimes' default seccomp profiles refuse to a container without the capability that they belong to.
const REFUSED: &[(&str, &[&str])] = &[
    ("BPF", &["bpf"]),
    ("PERFMON", &["perf_event_open"]),
    ("DAC_READ_SEARCH", &["open_by_handle_at"]),
    (
        "SYS_ADMIN",
        &[
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lookup_dcookie",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "pivot_root",
            "quotactl",
            "setdomainname",
            "sethostname",
            "setns",
            "swapoff",
            "swapon",
            "umount2",
            "unshare",
        ],
    ),
    ("SYS_BOOT", &["kexec_file_load", "kexec_load", "reboot"]),
    ("SYS_CHROOT", &["chroot"]),
    ("SYS_MODULE", &["delete_module", "finit_module", "init_module"]),
    ("SYS_NICE", &["get_mempolicy", "mbind", "migrate_pages", "move_pages", "set_mempolicy"]),
    ("SYS_PACCT", &["acct"]),
    ("SYS_PTRACE", &["kcmp", "pidfd_getfd"]),
    ("SYS_RAWIO", &["ioperm", "iopl"]),
    ("SYS_TIME", &["clock_adjtime", "clock_settime", "settimeofday"]),
    ("SYS_TTY_CONFIG", &["vhangup"]),
    ("SYSLOG", &["syslog"]),
    (
        "nobody",
        &[
            "add_key",
            "io_uring_enter",
            "io_uring_register",
            "io_uring_setup",
            "keyctl",
            "nfsservctl",
            "request_key",
            "userfaultfd",
            "uselib",
            "ustat",
        ],
    ),
];

/// Runs the command after it where cgroup v2 is at its usual place.
const UNIFIED: &str = "mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec \"$@\"";

/// What a DaemonSet says of its pods, with the ConfigMap that its variables come from.
#[derive(Clone, Debug)]
pub struct Pod {
    spec: PodSpec,
    options: BTreeMap<String, String>,
}

/// What the node gives a pod.
#[derive(Clone, Debug)]
pub struct Place<'a> {
    /// Its network.
    pub namespace: &'a Namespace,
    /// Its name.
    pub node_name: &'a str,
    /// Directories that stand for hostPaths of the node; cgroup v2 is at /sys/fs/cgroup.
    pub host_paths: &'a [(&'a str, &'a Path)],
    /// Token of the service account.
    pub token: &'a str,
}

/// A running container; killed on drop.
#[derive(Debug)]
pub struct Container {
    process: Process,
    folder: PathBuf,
}

impl Pod {
    /// Reads the only DaemonSet and its ConfigMap from what `kubectl kustomize` prints.
    ///
    /// # Errors
    /// If either is missing, or isn't what Kubernetes takes.
    pub fn read(objects: &[Value]) -> Result<Self> {
        let kind =
            |kind: &str| objects.iter().find(|object| object["kind"] == kind).with_context(|| format!("no {kind}"));
        let set: DaemonSet = serde_json::from_value(kind("DaemonSet")?.clone())?;
        let options: ConfigMap = serde_json::from_value(kind("ConfigMap")?.clone())?;
        let spec = set.spec.and_then(|spec| spec.template.spec).context("a DaemonSet without pods")?;
        ensure!(spec.host_network == Some(true), "the pod has a network of its own");
        Ok(Self { spec, options: options.data.unwrap_or_default() })
    }

    /// Sets an option in the ConfigMap.
    pub fn set(&mut self, option: &str, value: &str) {
        self.options.insert(option.to_owned(), value.to_owned());
    }

    /// The container.
    ///
    /// # Errors
    /// If there is none.
    pub fn container(&self) -> Result<&Spec> {
        self.spec.containers.first().context("a pod without containers")
    }

    fn security(&self) -> Result<&SecurityContext> {
        self.container()?.security_context.as_ref().context("a container without securityContext")
    }

    /// The capabilities that it gets, as Kubernetes writes them.
    ///
    /// # Errors
    /// If it doesn't drop all others.
    pub fn capabilities(&self) -> Result<Vec<String>> {
        let listed = self.security()?.capabilities.clone().context("no capabilities")?;
        ensure!(
            listed.drop == Some(vec!["ALL".to_owned()]),
            "the container keeps its runtime's capabilities: {listed:?}"
        );
        Ok(listed.add.unwrap_or_default())
    }

    /// Takes a capability from it.
    pub fn without(mut self, capability: &str) -> Self {
        let context = self.spec.containers.iter_mut().filter_map(|container| container.security_context.as_mut());
        for added in context.filter_map(|context| context.capabilities.as_mut()?.add.as_mut()) {
            added.retain(|added| added != capability);
        }
        self
    }

    /// Its variables: the ConfigMap's and its own.
    fn variables(&self, place: &Place) -> Result<Vec<String>> {
        let mut variables: Vec<String> = KUBERNETES.map(str::to_owned).to_vec();
        variables.extend(self.options.iter().map(|(name, value)| format!("{name}={value}")));
        for variable in self.container()?.env.iter().flatten() {
            let field =
                variable.value_from.as_ref().and_then(|from| Some(from.field_ref.as_ref()?.field_path.as_str()));
            let value = match (&variable.value, field) {
                (Some(value), None) => value,
                (None, Some("spec.nodeName")) => place.node_name,
                other => bail!("{} comes from {other:?}", variable.name),
            };
            variables.push(format!("{}={value}", variable.name));
        }
        Ok(variables)
    }

    fn mounts(&self, place: &Place, account: &Path) -> Result<Vec<Value>> {
        let mut mounts = vec![
            json!({"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]}),
            json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}),
            json!({"destination": "/sys", "type": "sysfs", "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", "ro"]}),
            json!({"destination": ACCOUNT, "type": "bind", "source": account, "options": ["rbind", "ro"]}),
        ];
        for mount in self.container()?.volume_mounts.iter().flatten() {
            let volume = self.spec.volumes.iter().flatten().find(|volume| volume.name == mount.name);
            let host = volume.and_then(|volume| volume.host_path.as_ref()).with_context(|| format!("{mount:?}"))?;
            let source = place.host_paths.iter().find(|(path, _)| *path == host.path);
            let (_, source) = source.with_context(|| format!("nothing stands for {}", host.path))?;
            let access = if mount.read_only == Some(true) { "ro" } else { "rw" };
            let propagation = match mount.mount_propagation.as_deref() {
                None | Some("None") => "rprivate",
                Some("HostToContainer") => "rslave",
                Some(other) => bail!("mountPropagation {other} needs a privileged container"),
            };
            mounts.push(json!({"destination": mount.mount_path, "type": "bind", "source": source,
                "options": ["rbind", access, propagation]}));
        }
        Ok(mounts)
    }

    /// The runtime's configuration.
    fn configuration(&self, image: &Value, place: &Place, account: &Path) -> Result<Value> {
        let security = self.security()?;
        ensure!(security.privileged == Some(false), "the container is privileged");
        let container = self.container()?;
        let capabilities = self.capabilities()?;
        let named: Vec<String> = capabilities.iter().map(|name| format!("CAP_{name}")).collect();
        let strings = |value: &Value| -> Vec<String> { serde_json::from_value(value.clone()).unwrap_or_default() };
        let arguments = [strings(&image["Entrypoint"]), container.args.clone().unwrap_or_default()].concat();
        let variables = [strings(&image["Env"]), self.variables(place)?].concat();
        let user = security.run_as_user.unwrap_or(0);
        let mut configuration = json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": user, "gid": user}, "cwd": "/",
                "args": arguments,
                "env": variables,
                "capabilities": {"bounding": named, "effective": named, "permitted": named},
                "noNewPrivileges": security.allow_privilege_escalation == Some(false),
            },
            "root": {"path": "rootfs", "readonly": security.read_only_root_filesystem == Some(true)},
            "mounts": self.mounts(place, account)?,
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "mount"}, {"type": "cgroup"}],
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        });
        match security.seccomp_profile.as_ref().map(|profile| profile.type_.as_str()) {
            Some("RuntimeDefault") => configuration["linux"]["seccomp"] = seccomp(&capabilities),
            other => bail!("the seccomp profile is {other:?}"),
        }
        Ok(configuration)
    }
}

/// What the default profiles refuse to a container with these capabilities. They list what is allowed instead; nothing that
/// their long list has matters here.
fn seccomp(capabilities: &[String]) -> Value {
    let refused = REFUSED.iter().filter(|(owner, _)| !capabilities.iter().any(|own| own == owner));
    let names: Vec<&str> = refused.flat_map(|(_, names)| *names).copied().collect();
    json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": libc::EPERM},
        // So that clone is used, whose flags a filter can see.
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS},
    ]})
}

impl Container {
    /// Starts a pod's container.
    ///
    /// # Errors
    /// If the image or crun is missing, or the pod asks for what isn't known here.
    pub fn start(pod: &Pod, place: &Place) -> Result<Self> {
        let name = unique_name();
        let folder = std::env::temp_dir().join(&name);
        let account = folder.join("account");
        fs::create_dir_all(&account).with_context(|| format!("making {}", account.display()))?;
        for (file, text) in [("token", place.token), ("namespace", "kube-system"), ("ca.crt", AUTHORITY)] {
            fs::write(account.join(file), text)?;
        }
        let image = unpack(&folder)?;
        let configuration = pod.configuration(&image, place, &account)?;
        fs::write(folder.join("config.json"), configuration.to_string())?;
        // In a PID namespace of the runtime's own, so that all of it ends with the test; and crun takes no hybrid of cgroup
        // versions.
        let mut command = place.namespace.command("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", UNIFIED, "sh"]);
        command.args(["crun", "--cgroup-manager", "disabled", "--root"]).arg(folder.join("state"));
        command.args(["run", "--bundle"]).arg(&folder).arg(&name);
        let process = Process::start(&format!("the container on {}", place.node_name), &mut command)?;
        Ok(Self { process, folder })
    }

    /// The runtime's process, whose output is the container's.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// A line of `/proc/PID/status` of the container's first process.
    ///
    /// # Errors
    /// If it isn't running.
    pub fn status(&self, field: &str) -> Result<String> {
        let children = |pid: &str| -> Result<String> {
            let path = format!("/proc/{pid}/task/{pid}/children");
            let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
            text.split_whitespace().next().map(str::to_owned).with_context(|| format!("{pid} has no child"))
        };
        // unshare, crun, the container.
        let pid = children(&children(&self.process.id().to_string())?)?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        Ok(line.with_context(|| format!("no {field} in {status}"))?.trim().to_owned())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.process.kill();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Unpacks the image of `cargo xtask test` into `rootfs`, and returns how it says to be run.
fn unpack(folder: &Path) -> Result<Value> {
    let architecture = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
    let target = built("sheave")?.ancestors().nth(2).context("sheave is built in a folder")?.to_owned();
    let archive = target.join(format!("image/sheave-{architecture}-debug.tar"));
    ensure!(archive.is_file(), "there is no image: `cargo xtask image --debug` makes {}", archive.display());
    let (layout, root) = (folder.join("image"), folder.join("rootfs"));
    fs::create_dir(&layout)?;
    fs::create_dir(&root)?;
    tar(["-xf".as_ref(), archive.as_os_str(), "-C".as_ref(), layout.as_os_str()])?;
    let blob = |descriptor: &Value| -> Result<PathBuf> {
        let digest = descriptor["digest"].as_str().context("a descriptor without digest")?;
        Ok(layout.join("blobs").join(digest.replace(':', "/")))
    };
    let json = |path: PathBuf| -> Result<Value> { Ok(serde_json::from_slice(&fs::read(path)?)?) };
    let manifest = json(blob(&json(layout.join("index.json"))?["manifests"][0])?)?;
    for layer in manifest["layers"].as_array().into_iter().flatten() {
        tar(["-xzf".as_ref(), blob(layer)?.as_os_str(), "-C".as_ref(), root.as_os_str()])?;
    }
    let mut config = json(blob(&manifest["config"])?)?;
    Ok(config["config"].take())
}

fn tar(arguments: [&OsStr; 4]) -> Result<()> {
    let output = Command::new("tar").args(arguments).output().context("cannot run tar")?;
    ensure!(output.status.success(), "tar {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
