//! Reads one credential file below an allowed directory.
//!
//! The path is walked with file descriptors: each part is opened relative to the directory before it, symbolic links are
//! resolved by this code, and a path that leaves the allowed directories is never accessed. So the error for a path outside
//! is the same whether the file exists or not, a file cannot be replaced between the check and the opening, and no device
//! or FIFO is opened. The links of a mounted Kubernetes secret (`token -> ..data/token`) stay inside.
//!
//! All of this blocks, and hangs with a network file system that hangs. Only the reader threads of [`super`] call it.

use std::ffi::{CStr, OsStr, OsString};
use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

/// Largest credential file; a signed token has a few KiB.
pub(super) const FILE_BYTES_MAX: u64 = 64 << 10;
/// Most symbolic links on the way to a file, as Linux allows.
const LINKS_MAX: usize = 40;
/// A directory whose name starts with this contains credentials for the host named after it only.
const HOST_MARK: char = '@';
/// Magic numbers of the file systems proc and sysfs, whose files the kernel generates.
const KERNEL_FILES: [rustix::fs::FsWord; 2] = [rustix::fs::PROC_SUPER_MAGIC, 0x6265_6572];

/// Why a file was refused. The text never contains the content of the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum FileError {
    /// The path is outside the allowed directories. The text is the same whether the file exists or not.
    #[error("not below an allowed directory")]
    Outside,
    #[error("no such file")]
    Missing,
    #[error("permission denied; the user of the gateway must be able to read it")]
    Denied,
    #[error("it is {0}, and only regular files are read")]
    Kind(&'static str),
    #[error("it is larger than 64 KiB")]
    TooLarge,
    #[error("it is empty")]
    Empty,
    #[error("it has more than one line")]
    Lines,
    #[error("it has characters other than printable ASCII")]
    Characters,
    #[error("too many symbolic links")]
    Links,
    #[error("it was replaced while it was opened")]
    Replaced,
    #[error("{0}")]
    Io(Errno),
}

impl From<Errno> for FileError {
    fn from(error: Errno) -> Self {
        match error {
            Errno::NOENT | Errno::NOTDIR => Self::Missing,
            Errno::ACCESS | Errno::PERM => Self::Denied,
            Errno::LOOP => Self::Links,
            other => Self::Io(other),
        }
    }
}

/// The content of a credential file.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// The secret, without white space around it.
    pub(super) secret: String,
    /// The hosts that directories of the path are named after. The secret is used for these hosts only.
    pub(super) hosts: Vec<String>,
}

/// The directories that may contain credential files.
#[derive(Debug, Clone, Default)]
pub(super) struct AllowedDirs {
    /// Absolute directories, as configured.
    pub(super) allowed: Vec<PathBuf>,
    /// Files and directories of Weir itself, which are never read as credentials.
    pub(super) never: Vec<PathBuf>,
}

impl AllowedDirs {
    /// The index of the allowed directory that contains a path, and the rest of the path. Accesses no file.
    pub(super) fn locate<'a>(&self, path: &'a Path) -> Option<(usize, &'a Path)> {
        let plain = path.is_absolute() && !path.components().any(|part| part == Component::ParentDir);
        let below = |root: &PathBuf| path.strip_prefix(root).ok().filter(|rest| *rest != Path::new(""));
        let mut found = self.allowed.iter().enumerate().filter_map(|(at, root)| Some((at, below(root)?)));
        found.next().filter(|_| plain)
    }
}

/// A directory of the path, with its name in the directory before.
struct Step {
    fd: OwnedFd,
    name: OsString,
}

/// Reads the file `below` the allowed directory at `root`. Blocks.
pub(super) fn read(dirs: &AllowedDirs, root: usize, below: &Path) -> Result<Found, FileError> {
    let mut hosts: Vec<String> = Vec::new();
    // Host directories count in the path as written and in the path as resolved.
    bind(below.iter(), &mut hosts);
    let (steps, name, stat) = walk(dirs, root, below)?;
    bind(steps.iter().map(|step| step.name.as_os_str()), &mut hosts);
    refuse_own(dirs, &steps, &stat)?;
    let directory = &steps.last().ok_or(FileError::Missing)?.fd;
    // The identity of the opened file is checked below. If it was replaced by a FIFO, NONBLOCK keeps the open from waiting.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, &name, flags, Mode::empty())?;
    let opened = rustix::fs::fstat(&file)?;
    if (opened.st_dev, opened.st_ino) != (stat.st_dev, stat.st_ino) {
        return Err(FileError::Replaced);
    }
    if KERNEL_FILES.contains(&rustix::fs::fstatfs(&file)?.f_type) {
        return Err(FileError::Kind("a file of the kernel"));
    }
    let mut bytes = Vec::new();
    let read = File::from(file).take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes);
    read.map_err(|error| Errno::from_io_error(&error).map_or(FileError::Io(Errno::IO), FileError::from))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(FileError::TooLarge);
    }
    Ok(Found { secret: secret(&bytes)?, hosts })
}

/// The secret in these bytes: one line of printable ASCII without surrounding white space.
pub(super) fn secret(bytes: &[u8]) -> Result<String, FileError> {
    let bytes = bytes.trim_ascii();
    if bytes.is_empty() {
        return Err(FileError::Empty);
    }
    if bytes.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
        return Err(FileError::Lines);
    }
    let printable = bytes.iter().all(|byte| matches!(byte, b' '..=b'~'));
    let text = std::str::from_utf8(bytes).ok().filter(|_| printable);
    text.map(str::to_owned).ok_or(FileError::Characters)
}

fn bind<'a>(names: impl Iterator<Item = &'a OsStr>, hosts: &mut Vec<String>) {
    for name in names {
        if let Some(host) = name.to_str().and_then(|name| name.strip_prefix(HOST_MARK)) {
            let host = host.to_ascii_lowercase();
            if !hosts.contains(&host) {
                hosts.push(host);
            }
        }
    }
}

/// Opens the directories of the path. Returns them, the name of the file and its status; the file is a regular file.
fn walk(dirs: &AllowedDirs, root: usize, below: &Path) -> Result<(Vec<Step>, OsString, Stat), FileError> {
    let mut steps = vec![open_root(dirs.allowed.get(root).ok_or(FileError::Outside)?)?];
    let mut links = 0;
    // The remaining parts, the next one last.
    let mut todo: Vec<OsString> = parts(below);
    while let Some(name) = todo.pop() {
        if name == ".." {
            steps.pop();
            if steps.is_empty() {
                return Err(FileError::Outside);
            }
            continue;
        }
        let here = &steps.last().ok_or(FileError::Outside)?.fd;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(here, &name, flags, Mode::empty())?;
        let stat = rustix::fs::fstat(&fd)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => {
                links += 1;
                if links > LINKS_MAX {
                    return Err(FileError::Links);
                }
                const ITSELF: &CStr = c"";
                let target = rustix::fs::readlinkat(&fd, ITSELF, Vec::new())?;
                let target = Path::new(OsStr::from_bytes(target.to_bytes()));
                let rest = if target.is_absolute() {
                    let (root, rest) = inside(dirs, target).ok_or(FileError::Outside)?;
                    steps = vec![open_root(root)?];
                    rest
                } else {
                    target.to_owned()
                };
                todo.extend(parts(&rest));
            }
            FileType::Directory if todo.is_empty() => return Err(FileError::Kind("a directory")),
            FileType::Directory => steps.push(Step { fd, name }),
            FileType::RegularFile if todo.is_empty() => return Ok((steps, name, stat)),
            FileType::RegularFile => return Err(FileError::Missing),
            FileType::Fifo => return Err(FileError::Kind("a FIFO")),
            FileType::Socket => return Err(FileError::Kind("a socket")),
            FileType::CharacterDevice | FileType::BlockDevice => return Err(FileError::Kind("a device")),
            FileType::Unknown => return Err(FileError::Kind("of an unknown kind")),
        }
    }
    Err(FileError::Kind("a directory"))
}

/// The parts of a path, the first one last.
fn parts(path: &Path) -> Vec<OsString> {
    let part = |part: Component<'_>| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    };
    let mut parts: Vec<OsString> = path.components().filter_map(part).collect();
    parts.reverse();
    parts
}

/// The allowed directory that contains an absolute link target, compared as configured and as resolved.
fn inside<'a>(dirs: &'a AllowedDirs, target: &Path) -> Option<(&'a Path, PathBuf)> {
    dirs.allowed.iter().find_map(|root| {
        let rest = target.strip_prefix(root).map(Path::to_owned);
        let real = || target.strip_prefix(std::fs::canonicalize(root).ok()?).map(Path::to_owned).ok();
        Some((root.as_path(), rest.ok().or_else(real)?))
    })
}

fn open_root(root: &Path) -> Result<Step, FileError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(root, flags, Mode::empty())?;
    // The allowed directory itself may be named after a host, for example as a mounted volume.
    Ok(Step { fd, name: root.file_name().unwrap_or_default().to_owned() })
}

/// Refuses files of Weir itself, compared by device and inode, because a file can have several names.
fn refuse_own(dirs: &AllowedDirs, steps: &[Step], stat: &Stat) -> Result<(), FileError> {
    for own in &dirs.never {
        let Ok(own) = rustix::fs::stat(own) else { continue };
        let is_own = |stat: &Stat| (stat.st_dev, stat.st_ino) == (own.st_dev, own.st_ino);
        if is_own(stat) || steps.iter().any(|step| rustix::fs::fstat(&step.fd).is_ok_and(|s| is_own(&s))) {
            return Err(FileError::Outside);
        }
    }
    Ok(())
}
