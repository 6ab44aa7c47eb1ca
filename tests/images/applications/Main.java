import java.util.stream.Collectors;
import java.util.stream.IntStream;

public class Main {
    public static void main(String[] args) throws InterruptedException {
        var groups = IntStream.range(0, 10_000).boxed().collect(Collectors.groupingBy(i -> i % 7));
        if (groups.size() != 7) throw new AssertionError("7 groups expected");
        System.out.println("ready");
        if (args.length > 0) Thread.sleep(Long.parseLong(args[0]) * 1000);
    }
}
