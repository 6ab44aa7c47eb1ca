//! File descriptors that go from process to process, and from number to number.
//!
//! The one file with unsafe code.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::{ManuallyDrop, MaybeUninit},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags},
    io::{DupFlags, dup3},
    ioctl::{self, Setter, opcode},
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
        recvmsg, sendmsg,
    },
};

/// The device through which file systems in user space talk to the kernel.
const FUSE_DEVICE: &str = "/dev/fuse";
/// `FUSE_DEV_IOC_CLONE` (Linux include/uapi/linux/fuse.h).
const CLONE: ioctl::Opcode = opcode::read::<u32>(229, 0);

/// Sends `bytes` over a Unix socket, with a duplicate of `descriptor` attached to the first of them; returns how many
/// were sent.
///
/// # Errors
///
/// What the kernel says.
pub fn send(socket: impl AsFd, bytes: &[u8], descriptor: impl AsFd) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor.as_fd()];
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

/// Receives bytes from a Unix socket, with the descriptor that is attached to them; returns how many bytes there are.
///
/// # Errors
///
/// What the kernel says.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptor = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            descriptor = descriptors.last();
        }
    }
    Ok((received.bytes, descriptor))
}

/// The descriptor that the service manager kept under `name` for this process, from the service's life before
/// (`sd_listen_fds(3)`). The first call gets it, others nothing.
///
/// # Errors
///
/// When what the environment says makes no sense.
pub fn take_from_service_manager(name: &str) -> io::Result<Option<OwnedFd>> {
    static IS_TAKEN: AtomicBool = AtomicBool::new(false);
    if IS_TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(None);
    }
    let number = sd_notify::listen_fds_with_names()?.find(|(_, found)| found == name).map(|(number, _)| number);
    // SAFETY: the environment says for this very process (LISTEN_PID) that it was started with this descriptor open, and
    // that it is for the process to use; nobody else here does, and this happens once.
    #[allow(unsafe_code)]
    Ok(number.map(|number| unsafe { OwnedFd::from_raw_fd(number) }))
}

/// Opens a descriptor that no session belongs to yet.
pub fn open_fuse_device() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(FUSE_DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

/// Whether the session of a `/dev/fuse` descriptor goes on: it is mounted or in use, and nobody aborted it.
pub fn has_session(device: impl AsFd) -> bool {
    let mut descriptors = [PollFd::new(&device, PollFlags::IN)];
    let polled = poll(&mut descriptors, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    polled.is_ok() && !descriptors[0].revents().intersects(PollFlags::ERR | PollFlags::NVAL)
}

/// Another descriptor of the same session. Requests that were read from `device` and not answered fail when the last
/// duplicate of it is closed; they are none of the new one's.
pub fn clone_fuse_device(device: impl AsFd) -> io::Result<OwnedFd> {
    let clone = open_fuse_device()?;
    let number = u32::try_from(device.as_fd().as_raw_fd()).map_err(io::Error::other)?;
    // SAFETY: the request reads one u32 from where the argument points (Linux fs/fuse/dev.c, fuse_dev_ioctl_clone),
    // which `Setter` passes. There is no safe function for it.
    #[allow(unsafe_code)]
    unsafe {
        ioctl::ioctl(&clone, Setter::<CLONE, u32>::new(number))?;
    }
    Ok(clone)
}

/// Has `place` mean what `descriptor` means, for everybody who uses its number.
pub fn replace(place: BorrowedFd<'_>, descriptor: impl AsFd) -> io::Result<()> {
    // SAFETY: the number is open for as long as the borrow lasts, and this second owner of it is never dropped. Safe
    // functions want the owner himself, but `fuser` keeps the descriptor of its session to itself.
    #[allow(unsafe_code)]
    let mut place = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(place.as_raw_fd()) });
    Ok(dup3(descriptor, &mut place, DupFlags::CLOEXEC)?)
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Write},
        os::unix::net::UnixStream,
    };

    use super::*;

    #[test]
    fn a_descriptor_goes_with_the_bytes_it_is_attached_to() {
        let (here, there) = UnixStream::pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        assert_eq!(send(&here, b"take it\n", &writer).unwrap(), 8);
        drop(writer);
        (&here).write_all(b"nothing").unwrap();
        let mut buffer = [0; 8];
        let (len, descriptor) = receive(&there, &mut buffer).unwrap();
        assert_eq!(&buffer[..len], b"take it\n");
        File::from(descriptor.unwrap()).write_all(b"through the pipe").unwrap();
        let mut text = String::new();
        File::from(reader).read_to_string(&mut text).unwrap();
        assert_eq!(text, "through the pipe");
        let (len, descriptor) = receive(&there, &mut buffer).unwrap();
        assert_eq!((&buffer[..len], descriptor.is_none()), (b"nothing".as_slice(), true));
    }

    #[test]
    fn a_replaced_descriptor_keeps_its_number() {
        let (first, second) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let number = first.0.as_raw_fd();
        replace(first.0.as_fd(), &second.0).unwrap();
        assert_eq!(first.0.as_raw_fd(), number);
        drop(second.0);
        (&first.0).write_all(b"x").unwrap();
        let mut byte = [0];
        (&second.1).read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }

    #[test]
    fn a_device_without_a_session_has_none() {
        assert!(!has_session(open_fuse_device().unwrap()));
    }
}
