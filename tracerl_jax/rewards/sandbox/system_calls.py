"""The system calls that a program under test has no business with, as a seccomp filter. Needs `pyseccomp`, which needs
the C library libseccomp (on nearly every Linux: systemd uses it)."""

import errno
import tempfile

REMEDY = "pip install pyseccomp, and the system's package libseccomp2 (libseccomp on Fedora)"

CLONE_THREAD = 0x10000

# Creating processes is left out on purpose (threads are allowed): it bounds what a program can do to one process.
REFUSED = """
    fork vfork execve execveat ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd process_madvise
    kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal
    socket bind listen connect accept accept4
    unshare setns mount umount umount2 pivot_root chroot move_mount open_tree fsopen fsmount fspick fsconfig
    mount_setattr memfd_create memfd_secret shmget shmat shmctl semget semctl msgget msgctl mq_open
    add_key request_key keyctl bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register
    open_by_handle_at name_to_handle_at fanotify_init quotactl personality acct swapon swapoff reboot kexec_load
    kexec_file_load init_module finit_module delete_module syslog settimeofday clock_settime clock_adjtime adjtimex
    setdomainname sethostname vhangup iopl ioperm lookup_dcookie nfsservctl
    sched_setscheduler sched_setattr sched_setaffinity setpriority ioprio_set
""".split()


def make_filter() -> bytes:
    """BPF for this machine's processor. Raises `ImportError` or `OSError` when the libraries are not there."""
    try:
        import pyseccomp
    except RuntimeError as error:  # its way to say that libseccomp is not installed
        raise ImportError(str(error)) from error
    rules = pyseccomp.SyscallFilter(defaction=pyseccomp.ALLOW)
    refusal = pyseccomp.ERRNO(errno.EPERM)
    for name in REFUSED:
        try:
            rules.add_rule(refusal, name)
        except (OSError, ValueError):
            pass  # a call that this processor or library does not know
    rules.add_rule(refusal, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, CLONE_THREAD, 0))
    rules.add_rule(refusal, "prlimit64", pyseccomp.Arg(0, pyseccomp.NE, 0))  # the limits of another process
    # Its flags lie in memory, where a filter cannot look; without it the C library uses clone.
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
