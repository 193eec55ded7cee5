//! What /proc says of a thread, in its file `status` (proc_pid_status(5)).

use std::fs;
use std::io;
use std::path::Path;

/// The text of `status`.
pub struct ThreadStatus(pub String);

impl ThreadStatus {
    /// Reads it from a directory of /proc: /proc/PID of the first thread, or one of /proc/PID/task.
    ///
    /// # Errors
    /// As read(2): also if the thread has ended.
    pub fn read(directory: &Path) -> io::Result<Self> {
        fs::read_to_string(directory.join("status")).map(Self)
    }

    /// Every field with its value.
    pub fn fields(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.lines().filter_map(|line| line.split_once(":\t"))
    }

    /// The value of a field.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields().find_map(|(field, value)| (field == name).then_some(value.trim_end()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name_and_may_be_empty() {
        let status = ThreadStatus("Uid:\t9\t9\nGroups:\t \nCapEff:\t00\n".to_owned());
        assert_eq!(status.field("Uid"), Some("9\t9"));
        assert_eq!(status.field("Groups"), Some(""));
        assert_eq!(status.field("Cap"), None);
        assert_eq!(status.fields().count(), 3);
        let ours = ThreadStatus::read(Path::new("/proc/self")).unwrap();
        assert!(ours.field("TracerPid").is_some());
    }
}
