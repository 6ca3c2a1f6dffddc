#!/bin/busybox sh
# First process of the virtual machine. The host's file system, read-only, becomes the root under a memory file system that
# takes what is written; /run.sh runs in it, and what it returns goes to the second serial port.
export PATH=/bin
busybox mkdir -p /proc /sys /dev
busybox mount -t proc proc /proc
case " $(busybox cat /proc/cmdline) " in *" sheave.probe "*)
    echo "sheave-vm: this accelerator works"
    busybox poweroff -f
esac
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev

fail() {
    echo "vm: $1"
    echo 125 >/dev/ttyS1
    busybox poweroff -f
}

for module in $(busybox cat /modules/order); do
    busybox insmod "/modules/$module" || fail "cannot load $module"
done
busybox mkdir -p /host /lib/modules /writes /root
share=trans=virtio,version=9p2000.L,msize=524288
busybox mount -t 9p -o "ro,cache=loose,$share" host /host || fail "cannot mount the host's file system"
if [ -s /modules/order ]; then
    busybox mount -t 9p -o "ro,cache=loose,$share" modules /lib/modules || fail "cannot mount the kernel's modules"
fi
busybox mount -t tmpfs writes /writes
busybox mkdir /writes/upper /writes/work
busybox mount -t overlay -o lowerdir=/host,upperdir=/writes/upper,workdir=/writes/work root /root || fail "no overlay"
busybox mount -t proc proc /root/proc
busybox mount -t sysfs sys /root/sys
busybox mount -t devtmpfs dev /root/dev
busybox mkdir -p /root/dev/pts /root/dev/shm /root/dev/net
busybox mount -t devpts devpts /root/dev/pts
# Not /tmp, where the repository may be: temporary files go to /run.
for folder in /run /dev/shm; do
    busybox mount -t tmpfs tmpfs "/root$folder"
done
# What is written here reaches the host.
busybox mkdir /root/run/results
busybox mount -t 9p -o "$share" results /root/run/results || fail "cannot mount the folder of results"
busybox mount -t bpf bpf /root/sys/fs/bpf || fail "no BPF file system"
busybox mount -t cgroup2 cgroup2 /root/sys/fs/cgroup || fail "no cgroup v2"
# The kernel asks for modules by itself: veth, bridges, nftables' expressions. It looks in this first root.
echo /sbin/modprobe >/proc/sys/kernel/modprobe
for module in tun br_netfilter; do
    # Without modules, it is built in or some tests say what they miss.
    [ ! -s /modules/order ] || busybox modprobe "$module" || fail "cannot load $module"
done
# As Debian's later kernels have it.
echo 1 >/proc/sys/net/core/bpf_jit_enable
busybox ip link set lo up
ulimit -l unlimited
busybox cp /run.sh /root/run/vm.sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp TMPDIR=/run
echo "vm: Linux $(/bin/busybox uname -r) is up after $(/bin/busybox cut -d. -f1 /proc/uptime) s"
/bin/busybox chroot /root /bin/sh /run/vm.sh
status=$?
echo "vm: done after $(/bin/busybox cut -d. -f1 /proc/uptime) s"
echo "$status" >/dev/ttyS1
/bin/busybox poweroff -f
