//! Prints what each kernel takes of a multiprocessor, as the table of README.md.

use paceline_cuda::image;

fn main() {
    println!("nvcc {}\n", image::NVCC_VERSION);
    print!("{}", image::table(&image::resources(image::REPORT)));
}
