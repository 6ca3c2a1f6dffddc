//! A virtual machine: started, watched, and stopped when it takes too long.

use std::fmt;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::image;
use super::kernels::Kernel;

/// A kernel that the processor runs is up in a second or two.
const PROBE_LIMIT: Duration = Duration::from_secs(15);
/// How long an emulated one may take until it says something. Now and then QEMU's emulation stands still while a kernel boots.
const BOOT_LIMIT: Duration = Duration::from_secs(4 * 60);
/// How often a machine that says nothing is started.
const BOOTS: u32 = 3;
/// What `init.sh` prints for a probe.
const PROBE_ANSWER: &str = "sheave-vm: this accelerator works";

/// How QEMU runs the machine.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Accelerator {
    /// On the processor.
    Kvm,
    /// In software, ten to thirty times slower.
    Emulation,
}

impl Accelerator {
    /// By what tests' time limits are multiplied.
    pub(super) fn slowness(self) -> u32 {
        match self {
            Self::Kvm => 1,
            Self::Emulation => 10,
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Kvm => "KVM",
            Self::Emulation => "emulated",
        })
    }
}

/// How a machine came to its end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// By itself.
    Off,
    /// It took too long, and was stopped.
    Stopped,
    /// It said nothing for too long, and was stopped.
    Silent,
}

/// A machine with one kernel.
pub(super) struct Machine<'a> {
    kernel: &'a Kernel,
    /// Where its files go.
    folder: PathBuf,
}

impl<'a> Machine<'a> {
    pub(super) fn new(kernel: &'a Kernel, folder: &Path) -> Result<Self> {
        let folder = folder.join("machine").join(&kernel.release);
        fs::create_dir_all(folder.join("results"))?;
        Ok(Self { kernel, folder })
    }

    /// Whether KVM runs this kernel. That the device is there says little: inside another virtual machine, it may hang.
    pub(super) fn probe(&self) -> Accelerator {
        if !Path::new("/dev/kvm").exists() {
            return Accelerator::Emulation;
        }
        let mut answered = false;
        let ran = self.boot(Accelerator::Kvm, "", "sheave.probe", PROBE_LIMIT, |line| {
            answered |= line.contains(PROBE_ANSWER);
        });
        if ran.is_ok_and(|end| end == End::Off) && answered {
            return Accelerator::Kvm;
        }
        println!("vm: /dev/kvm is there but does not run a kernel; emulating");
        Accelerator::Emulation
    }

    /// Boots, runs a script as root, and gives `read` each line that is printed. False if the script failed or took too long.
    pub(super) fn run(
        &self,
        accelerator: Accelerator,
        script: &str,
        limit: Duration,
        mut read: impl FnMut(&str) + Send,
    ) -> Result<bool> {
        let release = &self.kernel.release;
        let mut boots = 1;
        let end = loop {
            let end = self.boot(accelerator, script, "", limit, &mut read)?;
            if end != End::Silent || boots == BOOTS {
                break end;
            }
            println!("vm: {release} said nothing for {} minutes; it is started again", BOOT_LIMIT.as_secs() / 60);
            boots += 1;
        };
        match end {
            End::Off => {}
            End::Stopped => {
                println!("vm: {release} was stopped after {} minutes", limit.as_secs() / 60);
                return Ok(false);
            }
            End::Silent => {
                println!("vm: {release} never said anything in {BOOTS} starts");
                return Ok(false);
            }
        }
        let status = fs::read_to_string(self.status()).unwrap_or_default();
        if status.trim().is_empty() {
            println!("vm: {} ended before its script did", self.kernel.release);
        }
        Ok(status.trim() == "0")
    }

    /// What it boots.
    pub(super) fn kernel(&self) -> &'a Kernel {
        self.kernel
    }

    /// The folder that the guest has as `/run/results`.
    pub(super) fn results(&self) -> PathBuf {
        self.folder.join("results")
    }

    /// File behind the second serial port.
    fn status(&self) -> PathBuf {
        self.folder.join("status")
    }

    /// Starts QEMU and gives each line of the console to `read`.
    fn boot(
        &self,
        accelerator: Accelerator,
        script: &str,
        parameters: &str,
        limit: Duration,
        mut read: impl FnMut(&str) + Send,
    ) -> Result<End> {
        let archive = image::make(self.kernel, script, &self.folder)?;
        fs::write(self.status(), "")?;
        let mut qemu = self.command(accelerator, &archive, parameters);
        let mut child = qemu.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot run QEMU")?;
        let console = BufReader::new(child.stdout.take().context("QEMU's output was not piped")?);
        let spoke = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for line in console.split(b'\n').map_while(Result::ok) {
                    spoke.store(true, Ordering::Relaxed);
                    read(String::from_utf8_lossy(&line).trim_end_matches('\r'));
                }
            });
            let started = Instant::now();
            loop {
                if child.try_wait()?.is_some() {
                    return Ok(End::Off);
                }
                let silent = !spoke.load(Ordering::Relaxed) && started.elapsed() > BOOT_LIMIT;
                if silent || started.elapsed() > limit {
                    child.kill()?;
                    child.wait()?;
                    return Ok(if silent { End::Silent } else { End::Stopped });
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        })
    }

    fn command(&self, accelerator: Accelerator, archive: &Path, parameters: &str) -> Command {
        let share = |id: &str, path: &Path, readonly: &str| {
            let path = path.display().to_string().replace(',', ",,");
            [
                "-fsdev".to_owned(),
                format!("local,id={id},path={path},security_model=none,readonly={readonly},multidevs=remap"),
                "-device".to_owned(),
                format!("virtio-9p-pci,fsdev={id},mount_tag={id}"),
            ]
        };
        let mut qemu = Command::new("qemu-system-x86_64");
        match accelerator {
            Accelerator::Kvm => qemu.args(["-accel", "kvm", "-cpu", "host"]),
            // Each step of a string instruction is emulated by itself, so the kernel must not think that they are fast, and each
            // level of the page table costs.
            Accelerator::Emulation => {
                qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max,erms=off,fsrm=off,la57=off"])
            }
        };
        qemu.args(["-smp", "2", "-m", "3G", "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]);
        qemu.arg("-serial").arg(format!("file:{}", self.status().display()));
        qemu.arg("-kernel").arg(&self.kernel.image).arg("-initrd").arg(archive);
        // The emulated processor pays for mitigations of faults that it does not have, and on a busy host its timer fails the
        // kernel's check, which ends in a panic.
        qemu.arg("-append").arg(format!("console=ttyS0 quiet panic=-1 mitigations=off no_timer_check {parameters}"));
        qemu.args(share("host", Path::new("/"), "on"));
        qemu.args(share("results", &self.results(), "off"));
        // The modules' parent, where modprobe looks for the release's folder.
        if let Some(modules) = self.kernel.modules.as_deref().and_then(Path::parent) {
            qemu.args(share("modules", modules, "on"));
        }
        qemu
    }
}
